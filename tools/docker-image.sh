#!/usr/bin/env bash
# Builds the image of both services. The wheels are fetched here, not by the build: Docker's builds have no access to this
# machine's package index settings, and on many machines no network at all.
# Usage: docker-image.sh PYTHON IMAGE BASE
set -euo pipefail
python=$1 image=$2 base=$3
wheels=build/wheels

docker image inspect "$base" >/dev/null 2>&1 || docker pull -q "$base" >/dev/null || {
  echo "error: there is no image '$base' here and it can't be pulled; name another: make image BASE=…, or make one" \
    "with tools/docker-bed.sh" >&2
  exit 2
}
version=$(docker run --rm --network none --entrypoint python3 "$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

# What was fetched for these locks and this Python is kept.
wanted="$version $(cat requirements/build.lock requirements/runtime.lock | sha256sum | cut -c1-64)"
if [ "$(cat $wheels/.for 2>/dev/null)" != "$wanted" ]; then
  echo "==> fetching wheels for Python $version into $wheels"
  rm -rf $wheels && mkdir -p $wheels
  # pip knows only the tags it is told, when it isn't asked about its own Python.
  machine=$(uname -m)
  platforms=(--platform "manylinux1_$machine" --platform "manylinux2010_$machine" --platform "manylinux2014_$machine")
  for minor in $(seq 5 36); do platforms+=(--platform "manylinux_2_${minor}_$machine"); done
  for lock in build runtime; do
    "$python" -m pip download -qq --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
      --implementation cp --python-version "$version" "${platforms[@]}" -d $wheels -r requirements/$lock.lock
  done
  echo "$wanted" >$wheels/.for
fi

docker build -q -f deploy/Dockerfile --build-arg "BASE=$base" -t "$image" . >/dev/null
# docker's own size counts what is compressed or not by its version; the layers above the base are what we add.
size() { docker image inspect --format '{{.Size}}' "$1"; }
echo "==> image $image: $((($(size "$image") - $(size "$base")) / 1000000)) MB on top of $base"
