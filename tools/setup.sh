#!/usr/bin/env bash
# Installs the Debian packages that TriAxial is built from, but only those that are missing; instant when none is.
# Usage: tools/setup.sh build|test|tidy   (each includes the ones before it)
# docs/dependencies.md says what each package is for.
set -euo pipefail

build=(
  g++ cmake ninja-build pkg-config
  libboost1.81-dev libcli11-dev libdnnl-dev libfmt-dev libgif-dev libgtest-dev libhwy-dev
  libjpeg62-turbo-dev libpcre2-dev libpng-dev libspdlog-dev libssl-dev libutf8proc-dev libwebp-dev libxxhash-dev
  nlohmann-json3-dev prometheus-cpp-dev zlib1g-dev
)
test=(clang-format git python3 python3-venv)
tidy=(clang-tidy)

case "${1:-}" in
  build) wanted=("${build[@]}") ;;
  test) wanted=("${build[@]}" "${test[@]}") ;;
  tidy) wanted=("${build[@]}" "${test[@]}" "${tidy[@]}") ;;
  *)
    echo "usage: tools/setup.sh build|test|tidy" >&2
    exit 2
    ;;
esac

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "setup: this is not a Debian system, so nothing is installed; docs/dependencies.md lists what must be there" >&2
  exit 0
fi

installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${wanted[@]}" 2>/dev/null || true)
missing=()
for package in "${wanted[@]}"; do
  grep -qx "installed $package" <<<"$installed" || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  as_root=(sudo)
  [ -t 0 ] || as_root=(sudo -n) # nobody is there to type a password
  if ! command -v sudo >/dev/null || ! { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
    echo "setup: packages are missing and this user may not install them; as root, run: apt-get install ${missing[*]}" >&2
    exit 1
  fi
fi

apt() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 "$@"
}
echo "setup: installing ${missing[*]}"
apt update -q
apt install -q -y --no-install-recommends "${missing[@]}"
