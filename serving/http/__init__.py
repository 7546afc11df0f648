"""HTTP: the ASGI app, requests and responses, the demo page, telemetry."""
