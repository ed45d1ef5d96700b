#!/bin/sh
# install.sh: bring airgap from a bundle on a medium to a host that has no network.
#
#   sh install.sh --bundle NAME.agb [--user | --system] [--prefix DIR] [--root DIR]
#                 [--fingerprint sha256:... | FILE] [--site site.toml] [--model MODEL.agb]
#                 [--volume DIR] [--accelerator cpu|cuda] [--approval FILE]
#
# Needs Python 3.11 or newer, openssl 3.0 or newer, and nothing else. Before you run it, check it:
#
#   openssl pkeyutl -verify -pubin -inkey ALICE.pem -rawin -in SHA256SUMS -sigfile SHA256SUMS.alice.sig
#   sha256sum -c SHA256SUMS
#
# It asks for the fingerprint of the trust root, which came to you by another way than the medium,
# verifies the seal of the bundle with openssl, and only then takes wheels out of it. The program
# that it installs verifies the bundle again, completely. `--python PROGRAM`, given first, names
# another interpreter. Ends with 0 done, 1 refused, 2 usage, 3 fault; a refusal changes nothing.
# Of the environment it keeps HOME, TERM, TMPDIR and XDG_DATA_HOME, and nothing else.
set -eu
umask 022
unset IFS LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT PYTHONPATH PYTHONHOME OPENSSL_CONF 2>/dev/null || :
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
LC_ALL=C.UTF-8
export PATH LC_ALL

stop() {
  printf '%s\n' "$@" 'nothing was changed' >&2
  exit 3
}

python=''
if [ "${1:-}" = --python ] && [ "$#" -ge 2 ]; then
  python=$2
  shift 2
else
  for name in python3 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null 2>&1 &&
      "$name" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$name
      break
    fi
  done
fi
case $python in
*=*) stop 'fault install.target' "$python: env would take this name for a setting" ;;
esac
[ -n "$python" ] || stop 'fault install.target' 'no Python of 3.11 or newer was found' \
  'next step: name it, sh install.sh --python /path/to/python3.11 --bundle ...'
"$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  stop 'fault install.target' "$python is no Python of 3.11 or newer"
command -v openssl >/dev/null 2>&1 ||
  stop 'fault host.self' 'openssl was not found; nothing else here can check a signature'

# The program comes by descriptor 3, so that standard input stays yours.
exec env -i PATH="$PATH" LC_ALL="$LC_ALL" ${HOME+"HOME=$HOME"} ${TERM+"TERM=$TERM"} \
  ${TMPDIR+"TMPDIR=$TMPDIR"} ${XDG_DATA_HOME+"XDG_DATA_HOME=$XDG_DATA_HOME"} \
  "$python" -I -B -c '
import os
with os.fdopen(3, encoding="utf-8") as stream:
    program = stream.read()
exec(compile(program, "install.sh", "exec"))
' "$0" "$@" 3<<'END_OF_PROGRAM'
@PROGRAM@
END_OF_PROGRAM
