#!/usr/bin/env bash
# Packs a binary with the shared libraries that another machine may lack into FILE (.tar.gz): `triaxial/bin/NAME` and
# `triaxial/lib/`. What belongs to the C library or to CUDA is left to that machine, whose C library must not be older.
# Usage: tools/pack.sh BINARY FILE [MORE FILES OR DIRECTORIES TO PACK BESIDE]
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
binary=$1 file=$2
shift 2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/triaxial/bin" "$folder/triaxial/lib"
install -s "$binary" "$folder/triaxial/bin/"
ldd "$binary" | awk '$2 == "=>" && $3 ~ /^\// {print $3}' |
  grep -vE '/(libc|libm|libdl|librt|libpthread|libcuda|libcudart|libcublas|libcublasLt|libcudnn|libnccl|libcupti)\.so' |
  xargs -r cp -L -t "$folder/triaxial/lib"
strip "$folder"/triaxial/lib/*
for more in "$@"; do cp -rL "$more" "$folder/triaxial/"; done
mkdir -p "$(dirname "$file")"
tar -C "$folder" -czf "$file" triaxial
du -h "$file"
