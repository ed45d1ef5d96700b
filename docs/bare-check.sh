#!/bin/sh
# Check a bundle with nothing but tar, sha256sum, openssl (3.0 or newer) and the usual sed, base64.
# usage: sh bare-check.sh NAME.agb KEYS NEEDED EMPTY-FOLDER
#   KEYS    folder of public keys, NAME.pem, one for each person who may approve; they came here
#           by another way than the bundle, and `sha256sum` of each was compared
#   NEEDED  how many of them must have signed; the builder's key is not among them
# Ends with 0 and leaves the files in EMPTY-FOLDER only if everything holds. bundle/FORMAT.md 20.
set -eu
bundle=$1 keys=$2 needed=$3 out=$4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stop() { echo "REFUSED: $*" >&2; exit 1; }
test -d "$out" && test -z "$(ls -A "$out")" || stop "$out is no empty folder"

# 0. The file is a plain archive from its first byte on: tar must not guess a compression, nor take
#    a name with a colon for another host.
case $bundle in /*) ;; *) bundle=./$bundle ;; esac
tar() { command tar --force-local "$@"; }
test "$(head -c 23 "$bundle")" = META/envelope.dsse.json || stop "$bundle is no bundle"

# 1. The payload as it was signed, with the words that DSSE puts before it (FORMAT.md 8.2).
tar -xOf "$bundle" META/envelope.dsse.json > "$work/envelope" || stop "no envelope"
sed -n 's/^{"payload":"\([A-Za-z0-9+/=]*\)".*/\1/p' "$work/envelope" |
  base64 -d > "$work/payload" || stop "the payload is not base64"
size=$(wc -c < "$work/payload" | tr -d ' ')
{ printf 'DSSEv1 28 application/vnd.in-toto+json %s ' "$size"; cat "$work/payload"; } > "$work/pae"

# 2. One signature for each key: found by the id of the key, verified by openssl.
good=0
for key in "$keys"/*.pem; do
  id=$(openssl pkey -pubin -in "$key" -outform DER | sha256sum | cut -c1-64)
  sed -n "s/.*{\"keyid\":\"$id\",\"sig\":\"\([A-Za-z0-9+/=]*\)\"}.*/\1/p" "$work/envelope" |
    base64 -d > "$work/sig" || continue
  if openssl pkey -pubin -in "$key" -noout -text | grep -q ED25519; then
    openssl pkeyutl -verify -pubin -inkey "$key" -rawin -in "$work/pae" \
      -sigfile "$work/sig" > "$work/said" 2>&1 || continue
  else
    openssl dgst -sha384 -verify "$key" -signature "$work/sig" "$work/pae" \
      > "$work/said" 2>&1 || continue
  fi
  echo "signed by $(basename "$key" .pem)"
  good=$((good + 1))
done
test "$good" -ge "$needed" || stop "$good of $needed signatures hold"
grep -q '"predicateType":"https://airgap.invalid/seal/v1"' "$work/payload" || stop "no seal"

# 3. The manifest is the one that was signed; the list of digests is the one that it names.
tar -xOf "$bundle" META/manifest.json > "$work/manifest" || stop "no manifest"
named='s/.*{"digest":{"sha256":"\([0-9a-f]*\)"[^}]*},"name":"META\/manifest.json"}.*/\1/p'
echo "$(sed -n "$named" "$work/payload")  $work/manifest" | sha256sum -c --status - ||
  stop "the manifest is not the signed one"
tar -xOf "$bundle" META/SHA256SUMS > "$work/sums" || stop "no list of digests"
listed='s/.*"path":"META\/SHA256SUMS","role":"sums","sha256":"\([0-9a-f]*\)".*/\1/p'
echo "$(sed -n "$listed" "$work/manifest")  $work/sums" | sha256sum -c --status - ||
  stop "META/SHA256SUMS is not the signed one"

# 4. The archive holds plain files with exactly these names, in this order, and no others.
{
  printf 'META/%s\n' envelope.dsse.json trust.json manifest.json chunks.bin SHA256SUMS
  cut -c67- "$work/sums"
} > "$work/names"
tar --quoting-style=literal -tf "$bundle" | cmp -s - "$work/names" || stop "other members than listed"
tar -tvf "$bundle" | grep -qv '^-' && stop "a member is no plain file"

# 5. Only now is something extracted, and each file is held against the list.
tar -xf "$bundle" -C "$out" --no-same-owner --no-same-permissions || stop "tar cannot extract it"
if cmp -s "$work/manifest" "$out/META/manifest.json" && cmp -s "$work/sums" "$out/META/SHA256SUMS" &&
  (cd "$out" && sha256sum -c --strict --quiet "$work/sums"); then
  echo "whole: $(wc -l < "$work/sums") files in $out"
else
  chmod -R u+w "$out" && find "$out" -mindepth 1 -delete
  stop "a file is not the listed one"
fi
