# The service as an image: no torch, no compiler, no pip, nothing that serving does not import.
#
#   make image                        build it as fledge:latest
#   make image BUNDLE=bundle          with that bundle inside
#   make image TARGET=gpu             for NVIDIA GPUs
#   make image EXTRAS=heif,jxl        that reads HEIC and JPEG XL, too (their packages are GPL)
#   make run-image BUNDLE=bundle      serve a bundle from it, read-only and without privileges
#
# The bundle is mounted at /bundle, or inside; without a usable one the container says why and exits 78.
# BASE_IMAGE may be pinned: python:3.11-slim@sha256:…
ARG BASE_IMAGE=python:3.11-slim

# --- packages: a virtual environment at its final path, without pip in it ------------------------
FROM ${BASE_IMAGE} AS packages
RUN python -m venv --without-pip /opt/venv

FROM packages AS packages-cpu
ARG EXTRAS
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=requirements,target=/mnt/requirements \
    --mount=type=bind,source=deploy/image/packages.sh,target=/mnt/packages.sh \
    sh /mnt/packages.sh /mnt/requirements/serving-cpu.txt "$EXTRAS"

# CUDA and cuDNN come as wheels: the driver is the host's, and there is no second CUDA.
FROM packages AS packages-gpu
ARG EXTRAS
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=requirements,target=/mnt/requirements \
    --mount=type=bind,source=deploy/image/packages.sh,target=/mnt/packages.sh \
    sh /mnt/packages.sh /mnt/requirements/serving-gpu.txt "$EXTRAS"

# --- app: our own files with their bytecode, since the root is read-only when it runs -------------
FROM ${BASE_IMAGE} AS app
COPY fledge.py deploy/image/healthcheck.py /app/
COPY serving /app/serving
RUN python -m compileall -q --invalidation-mode unchecked-hash /app && chmod -R a+rX /app

# --- runtime: what both targets have -------------------------------------------------------------
FROM ${BASE_IMAGE} AS runtime
# The base image's own pip and its kin are no use to a service and some use to an intruder.
RUN for site in /usr/local/lib/python3*/site-packages /usr/lib/python3/dist-packages; do \
      rm -rf "$site"/pip "$site"/pip-* "$site"/setuptools "$site"/setuptools-* "$site"/wheel "$site"/wheel-* \
        "$site"/pkg_resources "$site"/_distutils_hack "$site"/distutils-precedence.pth; \
    done \
 && rm -rf /usr/local/bin/pip* /usr/bin/pip* /usr/local/bin/wheel* /usr/bin/wheel* \
      /usr/local/lib/python3*/ensurepip /usr/lib/python3*/ensurepip
# numpy's BLAS is not what computes here; its threads would be as many as the host has cores.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    OPENBLAS_NUM_THREADS=1 \
    FLEDGE_BUNDLE=/bundle \
    BENTOML_DO_NOT_TRACK=True \
    ORT_DISABLE_TELEMETRY=1
ARG BASE_IMAGE
LABEL org.opencontainers.image.title="fledge" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.description="An image classifier served over HTTP from a verified bundle" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /app
USER 10001:10001
EXPOSE 3000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD ["python", "/app/healthcheck.py"]
ENTRYPOINT ["fledge"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--port", "3000"]

# --- gpu: the host brings the driver and the NVIDIA container toolkit ------------------------------
FROM runtime AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-gpu /opt/venv /opt/venv
COPY --from=app /app /app
ARG VERSION=0 REVISION=unknown
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# --- cpu: the last, so what a plain `docker build .` makes ------------------------------------------
FROM runtime AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv
COPY --from=app /app /app
ARG VERSION=0 REVISION=unknown
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
