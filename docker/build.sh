#!/usr/bin/env bash
# Builds an image from this checkout, on the base that pins.env names:
#   docker/build.sh ngc|cpu [further arguments of docker build]
# NGC_TAG or PYTHON_TAG in the environment name another base, IMAGE another name than megadpo:ngc or megadpo:cpu, and
# DOCKER another program with docker's arguments, such as podman.
set -euo pipefail

usage="usage: docker/build.sh ngc|cpu [argument of docker build ...]"
kind="${1:?"$usage"}"
shift
case "$kind" in
  ngc) pin=NGC_TAG ;;
  cpu) pin=PYTHON_TAG ;;
  *) echo "docker/build.sh: no image '$kind'; $usage" >&2; exit 2 ;;
esac
here="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
tag="${!pin:-$(sed -n "s/^$pin=//p" "$here/pins.env")}"
exec "${DOCKER:-docker}" build --file "$here/$kind.Dockerfile" --build-arg "$pin=$tag" \
  --tag "${IMAGE:-megadpo:$kind}" "$@" "$here/.."
