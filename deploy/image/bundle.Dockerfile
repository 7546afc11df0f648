# An image with a bundle inside; its folder is the build's context. `make image BUNDLE=…` builds it.
ARG IMAGE=fledge
FROM ${IMAGE} AS bundle
USER 0
COPY . /bundle
RUN chmod -R a+rX,go-w /bundle

FROM ${IMAGE}
COPY --from=bundle /bundle /bundle
# One that could not be served makes no image.
RUN ["fledge", "verify", "/bundle"]
