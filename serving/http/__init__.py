"""HTTP API of the service: ASGI app, requests and responses, demo page, telemetry."""
