# Stands in for the official haproxy image, from Debian's package.
ARG BASE=modelswap-base:bookworm
FROM ${BASE}
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends haproxy && rm -rf /var/lib/apt/lists/*
