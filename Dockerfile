# syntax=docker/dockerfile:1
FROM rust:1.95-slim-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential protobuf-compiler \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# The caches keep what was downloaded and compiled from one build to the next, so a change to the
# sources does not compile the dependencies again. They are not part of the image: hence the copy.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --all-features && cp target/release/twinspan /usr/local/bin/

FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --no-create-home twinspan \
 && install -d -o twinspan /data
COPY --from=build /usr/local/bin/twinspan /usr/local/bin/
WORKDIR /app
COPY config config
ENV TWINSPAN_SERVER__DATA_DIR=/data
VOLUME /data
# By number, so that an orchestrator can see that it is not root.
USER 10001
EXPOSE 8090 8091
# Degraded (1) still serves, and restarting the bridge would not mend a broker; only 2 is unhealthy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s \
  CMD twinspan health >/dev/null || [ $? -eq 1 ]
ENTRYPOINT ["twinspan"]
CMD ["serve"]
