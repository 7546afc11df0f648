# An image that contains a bundle. The build context is the bundle's folder: `make image BUNDLE=…`.
ARG IMAGE=fledge
FROM ${IMAGE} AS bundle
USER 0
COPY . /bundle
RUN chmod -R a+rX,go-w /bundle

FROM ${IMAGE}
COPY --from=bundle /bundle /bundle
# The build fails if the bundle can't be served.
RUN ["fledge", "verify", "/bundle"]
