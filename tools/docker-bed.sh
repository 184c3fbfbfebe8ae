#!/usr/bin/env bash
# Makes this machine able to run the tests that need Docker: a daemon, Compose, and images made without a registry. What is
# there already is left as it is, so the second time takes a second. A daemon that this starts stays.
# Usage: docker-bed.sh PYTHON VENV   (root, or sudo without a password, where something is missing)
set -euo pipefail
python=$1 venv=$2
base=${MODELSWAP_TEST_BASE:-modelswap-base:bookworm}
suite=bookworm
config=$PWD/$venv/docker # a DOCKER_CONFIG of the tests' own
log=$config/dockerd.log

fail() {
  echo "error: $1" >&2
  exit 2
}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else
    sudo -n "$@" || fail "'$*' needs root: run this as root, or allow sudo without a password"
  fi
}

# install COMMAND=PACKAGE…: whatever is not there yet.
install() {
  local missing=() pair
  for pair in "$@"; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || fail "${missing[*]} is missing, and only apt is known here: install it by hand"
  echo "==> installing ${missing[*]}"
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" \
    >"$config/apt.log" 2>&1 || { cat "$config/apt.log" >&2 && fail "apt can't install ${missing[*]}"; }
}

answers() { docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }

# until SECONDS COMMAND…
until_within() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $deadline ] || return 1
    sleep 0.2
  done
}

start_daemon() {
  answers && return
  if [ -S /var/run/docker.sock ] && docker version 2>&1 | grep -q 'permission denied'; then
    fail "this user may not talk to Docker: add it to the group docker (usermod -aG docker $(id -un)), and log in anew"
  fi
  echo "==> starting dockerd"
  if [ -d /run/systemd/system ]; then
    as_root systemctl start docker || fail "Docker doesn't start: journalctl -u docker tells why"
    until_within 60 answers || fail "Docker doesn't answer after 60 s: journalctl -u docker tells why"
    return
  fi
  # The package's own start script may be at it already.
  [ -e /var/run/docker.pid ] && until_within 20 answers && return
  # In a session of its own, so that it outlives us.
  as_root setsid env PATH="$PATH:/usr/sbin:/sbin" dockerd >"$log" 2>&1 </dev/null &
  until_within 60 answers && return
  tail -n 20 "$log" >&2
  if grep -qi 'iptables' "$log"; then
    fail "dockerd can't set up its networks with iptables. As root on a whole (virtual) machine, try the older one:
  update-alternatives --set iptables /usr/sbin/iptables-legacy
In a container it needs the capability NET_ADMIN (docker run --privileged)."
  elif grep -qi 'cgroup' "$log"; then
    fail "dockerd finds no cgroups: mount them first (apt install cgroupfs-mount; cgroupfs-mount)"
  fi
  fail "dockerd doesn't answer after 60 s; its log is $log"
}

install_compose() {
  local plugin=$config/cli-plugins/docker-compose made=$config/compose
  if ! cmp -s requirements/compose.lock "$made/installed.lock"; then
    echo "==> installing Compose"
    rm -rf "$made"
    "$python" -m pip install -qq --disable-pip-version-check --no-deps --no-warn-script-location --require-hashes \
      --prefix "$made" -r requirements/compose.lock
    cp requirements/compose.lock "$made/installed.lock"
  fi
  mkdir -p "$config/cli-plugins"
  ln -sf "$made/bin/docker-compose" "$plugin"
}

# Where apt takes this Debian release from, if it does; else debootstrap's default is right.
mirror() {
  apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
    awk -v suite=$suite '$1 == suite && $2 == "main" && $3 ~ /^https?:/ {print $3; exit}'
}

proxy() { apt-config dump --format '%v' Acquire::http::Proxy 2>/dev/null | grep -v '^DIRECT$' || true; }

import_base() {
  docker image inspect "$base" >/dev/null 2>&1 && return
  install debootstrap=debootstrap
  [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || install no-such-command=debian-archive-keyring
  echo "==> making $base with debootstrap (about a minute, once)"
  local folder
  folder=$(mktemp -d)
  if ! as_root env PATH="$PATH:/usr/sbin:/sbin" http_proxy="${http_proxy:-$(proxy)}" debootstrap --variant=minbase \
    --include=python3,python3-venv,ca-certificates $suite "$folder/root" $(mirror) >"$folder/log" 2>&1; then
    tail -n 20 "$folder/log" >&2
    as_root rm -rf --one-file-system "$folder"
    fail "debootstrap failed (see above)"
  fi
  as_root rm -rf "$folder"/root/var/cache/apt/archives/*.deb
  as_root tar -C "$folder/root" -c . | docker import --change 'CMD ["/bin/sh"]' - "$base" >/dev/null
  as_root rm -rf --one-file-system "$folder"
}

mkdir -p "$config"
install dockerd=docker.io iptables=iptables curl=curl jq=jq
start_daemon
export DOCKER_CONFIG=$config
install_compose
import_base
image=${MODELSWAP_TEST_IMAGE:-modelswap:latest}
bash tools/docker-image.sh "$python" "$image" "$base"
build() { docker build -q --build-arg "http_proxy=${http_proxy:-$(proxy)}" "$@" tests/docker/image >/dev/null; }
build --build-arg "IMAGE=$image" -t "${MODELSWAP_TEST_ENGINE:-modelswap-engine:latest}"
haproxy=(--build-arg "BASE=$base" -t "${MODELSWAP_TEST_PROXY:-modelswap-haproxy:latest}" -f tests/docker/image/haproxy.Dockerfile)
# Where containers have no network, the machine's own may do.
build "${haproxy[@]}" || build --network host "${haproxy[@]}" || fail "haproxy can't be installed into an image (see above)"
echo "==> Docker $(docker version --format '{{.Server.Version}}'), Compose $(docker compose version --short)"
