# syntax=docker/dockerfile:1
# Sealpost in a small image, as a user without rights. `docker build -t sealpost .`

FROM rust:1.95-slim-bookworm AS build
# protoc and C for libsignal, ring, SQLite and mimalloc; OpenSSL and zlib for librdkafka.
RUN apt-get update && apt-get install -y --no-install-recommends \
        build-essential libssl-dev pkg-config protobuf-compiler zlib1g-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin sealpost \
    && install -D --strip target/release/sealpost /out/sealpost

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates libssl3 zlib1g \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /data --shell /usr/sbin/nologin sealpost \
    && install -d -o sealpost -g sealpost /data
COPY --from=build /out/sealpost /usr/local/bin/sealpost
USER sealpost
WORKDIR /data
VOLUME /data
# From outside of the container only addresses that are not loopback can be reached. That needs realms (or SEALPOST_DEV=true to try it out).
ENV SEALPOST_DATA=/data SEALPOST_LISTEN=0.0.0.0:8470
EXPOSE 8470
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s --retries=3 CMD ["sealpost", "probe"]
ENTRYPOINT ["sealpost"]
CMD ["serve"]
