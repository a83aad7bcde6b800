#!/usr/bin/env bash
# JupyterLab on a pod: on 127.0.0.1 alone, with a token that is in one file of mode 600 and nowhere else. Reach it through an SSH tunnel.
set -euo pipefail
NAME=lab DRY=0 PORT=8888 VOLUME=/workspace PROXY=0
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$HERE/lib.sh"

usage() { cat <<'TEXT'
Usage: runpod/lab.sh [options]
  --dry-run           print every command, do nothing
  --port N            on 127.0.0.1 (default 8888)
  --volume DIR        where the volume is mounted (default /workspace)
  --lab-proxy WORDS   listen on all addresses, so that the provider's public proxy shows Lab to everybody who has the token;
                      only with the words: "yes, open to the internet"
  -h, --help
Run runpod/setup_pod.sh first. Lab shows DEEPFAKE_NB_HOME/book/COMMIT/nbs, a clone of this checkout made once for each commit and never
overwritten: what you change there is on the volume, survives a stop, and git knows it. (The checkout itself lies on the container's disk.)
TEXT
}
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) DRY=1 ;;
    --port) need "$@"; PORT=$2; shift ;;
    --volume) need "$@"; VOLUME=$2; shift ;;
    --lab-proxy) [ "${2:-}" = "yes, open to the internet" ] || die 'Lab behind the public proxy can be reached by everybody, and who has the token has the pod. Use the tunnel; if you must: --lab-proxy "yes, open to the internet"'
                 PROXY=1; shift ;;
    -h|--help) usage; exit 0 ;;
    *) die "unknown option '$1', see --help" ;;
  esac
  shift
done
[[ $PORT =~ ^[0-9]+$ ]] || die "'$PORT' is no port"

HOME_DIR=$(realpath -ms "${DEEPFAKE_NB_HOME:-$VOLUME/deepfake_nb}") RUNTIME=${TMPDIR:-/tmp}/deepfake_nb.lab.$PORT
TOKEN=$HOME_DIR/pod/token ADDRESS=127.0.0.1
[ "$PROXY" = 0 ] || ADDRESS=0.0.0.0

make_token() { # once: a token that changed would lock out the watchdog and open windows
  if [ -s "$TOKEN" ]; then chmod 600 "$TOKEN"; return; fi
  (umask 077; mkdir -p "${TOKEN%/*}"; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$TOKEN.part"; mv "$TOKEN.part" "$TOKEN")
}
BOOK=$HOME_DIR/book/$(git -C "$HERE" rev-parse --short=12 HEAD) || die "$HERE/.. is no git checkout, so what is changed in Lab could not be kept: clone it"
make_book() {
  [ ! -d "$BOOK" ] || return 0
  local part; part=$(mkdir -p "${BOOK%/*}" && mktemp -d "$BOOK.XXXXXX.part") # another pod may be at it
  git clone -q "$HERE/.." "$part"
  mv -T "$part" "$BOOK" || { rm -rf "$part"; [ -d "$BOOK" ]; }
}
run_here() { show "$@"; [ "$DRY" = 1 ] || "$@"; }
run_here make_token
run_here make_book
run_here mkdir -p -m 700 "$RUNTIME"
# shellcheck disable=SC2119 # no name is let through
mapfile -t HIDE < <(hidden)
say "JupyterLab listens on $ADDRESS:$PORT of this pod; its token is in $TOKEN"
if [ "$PROXY" = 0 ]; then
  say "from your own machine: ssh -N -L $PORT:127.0.0.1:$PORT -p ${RUNPOD_TCP_PORT_22:-PORT} root@${RUNPOD_PUBLIC_IP:-ADDRESS}"
  say "then open http://127.0.0.1:$PORT/lab and give it the token: ssh -p ${RUNPOD_TCP_PORT_22:-PORT} root@${RUNPOD_PUBLIC_IP:-ADDRESS} cat $TOKEN"
fi
LAB=(env "${HIDE[@]}" "JUPYTER_TOKEN_FILE=$TOKEN" "JUPYTER_RUNTIME_DIR=$RUNTIME" "$HOME_DIR/venv/bin/python" -m jupyterlab --no-browser --allow-root
  "--ServerApp.ip=$ADDRESS" "--ServerApp.port=$PORT" --ServerApp.port_retries=0 "--ServerApp.root_dir=$BOOK/nbs")
[ "$PROXY" = 0 ] || LAB+=(--ServerApp.allow_remote_access=True)
show "${LAB[@]}"
[ "$DRY" = 1 ] || exec "${LAB[@]}" </dev/null
