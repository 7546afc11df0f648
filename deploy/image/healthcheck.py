"""HEALTHCHECK of the image: exit with status 0 if the service on port 3000 is ready."""

import http.client
import os
import ssl

connection = http.client.HTTPConnection("127.0.0.1", 3000, timeout=2)
if os.environ.get("FLEDGE_TLS_CERT", "").strip():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The certificate names the service, not 127.0.0.1; nothing secret is sent.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", 3000, timeout=2, context=context)
connection.request("GET", "/readyz")
raise SystemExit(connection.getresponse().status != 200)
