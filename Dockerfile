# The service as an image: no torch, no compiler, no pip, nothing that serving does not import.
#
#   make image                      build it as fledge:latest
#   make run-image BUNDLE=bundle    serve a bundle from it, read-only and without privileges
#
# The bundle is mounted at /bundle; without a usable one the container says why and exits 78.
ARG BASE_IMAGE=python:3.11-slim

# --- build: a virtual environment at its final path, without pip in it ---------------------------
FROM ${BASE_IMAGE} AS build-cpu
COPY requirements/serving-cpu.txt /tmp/requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --disable-pip-version-check --no-compile \
      --only-binary :all: --require-hashes --requirement /tmp/requirements.txt
# What wheels carry and serving never imports goes; bytecode comes now, since the root is read-only
# when it runs, and unchecked, since its sources never change.
RUN cd /opt/venv/lib/python3*/site-packages \
 && find . -depth \( -type d \( -name tests -o -name test \) -o -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' \
      -o -name '*.h' -o -name '*.a' \) -exec rm -rf {} + \
 && rm -rf numpy/f2py numpy/distutils \
      onnxruntime/transformers onnxruntime/quantization onnxruntime/tools onnxruntime/datasets \
 && echo /app >fledge.pth \
 && printf '#!/opt/venv/bin/python\nimport sys\nfrom fledge import main\nsys.exit(main())\n' >/opt/venv/bin/fledge \
 && chmod 755 /opt/venv/bin/fledge \
 && /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash "$PWD"
COPY fledge.py /app/
COPY serving /app/serving
ARG VERSION=0
RUN mkdir "/app/fledge-${VERSION}.dist-info" \
 && printf 'Metadata-Version: 2.1\nName: fledge\nVersion: %s\n' "${VERSION}" \
      >"/app/fledge-${VERSION}.dist-info/METADATA" \
 && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /app \
 && chmod -R a+rX /app

# --- cpu: what runs ------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS cpu
# The base image's own pip and its kin are no use to a service and some use to an intruder.
RUN for site in /usr/local/lib/python3*/site-packages /usr/lib/python3/dist-packages; do \
      rm -rf "$site"/pip "$site"/pip-* "$site"/setuptools "$site"/setuptools-* "$site"/wheel "$site"/wheel-* \
        "$site"/pkg_resources "$site"/_distutils_hack "$site"/distutils-precedence.pth; \
    done \
 && rm -rf /usr/local/bin/pip* /usr/bin/pip* /usr/local/bin/wheel* /usr/bin/wheel* \
      /usr/local/lib/python3*/ensurepip /usr/lib/python3*/ensurepip
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    FLEDGE_BUNDLE=/bundle \
    BENTOML_DO_NOT_TRACK=True \
    ORT_DISABLE_TELEMETRY=1
COPY --from=build-cpu /opt/venv /opt/venv
COPY --from=build-cpu /app /app
ARG VERSION=0 REVISION=unknown
LABEL org.opencontainers.image.title="fledge" \
      org.opencontainers.image.description="An image classifier served over HTTP from a verified bundle" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /app
USER 10001:10001
EXPOSE 3000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 3000, timeout=2); c.request('GET', '/readyz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["fledge"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--port", "3000"]
