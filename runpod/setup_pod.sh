#!/usr/bin/env bash
# Make a fresh pod ready, or bring one up to date: run it as often as you like. It never replaces a torch >= 2.10 that the pod came with.
# The first thing it does is to arm the deadline after which the pod stops itself, whatever happens later.
set -euo pipefail

usage() { cat <<'TEXT'
Usage: runpod/setup_pod.sh [options]
  --dry-run           print every command, do nothing
  --hours H           stop the pod H hours after the first call (default 12.8: five dollars at $0.39 an hour)
  --no-deadline       arm no deadline (you pay until you stop the pod yourself)
  --volume DIR        where the volume is mounted (default /workspace)
  --off-volume        allow DEEPFAKE_NB_HOME outside the volume: checkpoints are lost when the pod stops
  --python PY         Python 3.11 or newer, the one that has the pod's torch (default python3)
  --cuda-extra        compiled Mamba kernels: prebuilt wheels up to torch 2.10
  --accept-compile    with --cuda-extra and a newer torch: compile them, after the printed estimate
  --price D           dollars an hour, for the estimate (default 0.39)
  -h, --help
DEEPFAKE_NB_HOME must lie on the volume (default DIR/deepfake_nb).
TEXT
}
say()  { printf '# %s\n' "$*"; }
die()  { printf 'setup_pod: %s\n' "$*" >&2; exit 1; }
need() { [ -n "${2:-}" ] || die "$1 needs a value, see --help"; }

DRY=0 HOURS=12.8 DEADLINE=1 VOLUME=/workspace OFF=0 PYTHON=python3 CUDA=0 COMPILE=0 PRICE=0.39
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) DRY=1 ;;
    --hours) need "$@"; HOURS=$2; shift ;;
    --no-deadline) DEADLINE=0 ;;
    --volume) need "$@"; VOLUME=$2; shift ;;
    --off-volume) OFF=1 ;;
    --python) need "$@"; PYTHON=$2; shift ;;
    --cuda-extra) CUDA=1 ;;
    --accept-compile) COMPILE=1 ;;
    --price) need "$@"; PRICE=$2; shift ;;
    -h|--help) usage; exit 0 ;;
    *) die "unknown option '$1', see --help" ;;
  esac
  shift
done
for n in "$HOURS" "$PRICE"; do [[ $n =~ ^[0-9]+([.][0-9]+)?$ ]] || die "'$n' is not a number"; done

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
HOME_DIR=$(realpath -ms "${DEEPFAKE_NB_HOME:-$VOLUME/deepfake_nb}")
VENV=$HOME_DIR/venv LOCK=$HOME_DIR/torch.lock
# Pinned here because they are needed before, or instead of, constraints.txt.
UV='uv==0.13.8' BUILD=('ninja==1.13.0' 'setuptools==80.9.0' 'wheel==0.45.1' packaging) CUDA_TORCH=('torch==2.10.0' 'torchvision==0.25.0')

run() { # print a command so that it can be pasted, then do it
  local a; printf '+'
  for a in "$@"; do if [[ $a =~ ^[A-Za-z0-9_./:=,@+-]+$ ]]; then printf ' %s' "$a"; else printf ' %s' "${a@Q}"; fi; done
  printf '\n'
  if [ "$(type -t "$1")" = function ]; then declare -f "$1" | sed 's/^/    /'; fi
  [ "$DRY" = 1 ] || "$@"
}
put() { # write standard input to a file, whole or not at all
  local text; text=$(cat)
  printf '+ write %q\n' "$1"; printf '%s\n' "$text" | sed 's/^/    /'
  [ "$DRY" = 1 ] || { printf '%s\n' "$text" > "$1.part"; mv "$1.part" "$1"; }
}

# --- 1. the deadline, before anything that could fail or hang
ARMED=${DEEPFAKE_NB_DEADLINE_FILE:-/tmp/deepfake_nb.deadline} RETRY=${DEEPFAKE_NB_DEADLINE_RETRY:-60}
boot() { awk '{print $22}' /proc/1/stat; } # when the container started: a pod that was stopped gets a new deadline

arm_deadline() {
  local now end pid=0 stamp=0 old=0
  now=$(date +%s); end=$(awk -v n="$now" -v h="$HOURS" 'BEGIN{printf "%d", n+h*3600}')
  if [ -f "$ARMED" ]; then
    read -r old stamp pid < "$ARMED"
    if [ "$stamp" = "$(boot)" ]; then
      end=$old # a second call does not buy time
      if [ -r "/proc/$pid/cmdline" ] && tr '\0' ' ' < "/proc/$pid/cmdline" | grep -q 'runpodctl'; then say "the deadline is armed already: $ARMED"; return; fi
    fi
  fi
  # Two spellings of one command, the new and the old; retried for ever, since a failed stop costs money by the hour.
  # shellcheck disable=SC2016
  local switch='sleep "$1"; until runpodctl pod stop "$RUNPOD_POD_ID" || runpodctl stop pod "$RUNPOD_POD_ID"; do sleep "$2"; done'
  local left=$(( end > now ? end-now : 0 ))
  if [ "$DRY" = 1 ]; then
    printf '+ nohup sh -c %s deadline %q %q >%q 2>&1 &\n' "${switch@Q}" "$(awk -v h="$HOURS" 'BEGIN{printf "%d", h*3600}')" "$RETRY" "$ARMED.log"
    return
  fi
  nohup sh -c "$switch" deadline "$left" "$RETRY" >"$ARMED.log" 2>&1 </dev/null &
  printf '%s %s %s\n' "$end" "$(boot)" "$!" > "$ARMED"
  say "this pod stops itself in $left s: $ARMED, $ARMED.log"
}

# An SSH session lacks the container's variables. Of those only the pod's name is taken.
FIRST=${DEEPFAKE_NB_POD_ENVIRON:-/proc/1/environ}
if [ "$DEADLINE" = 1 ] && [ -z "${RUNPOD_POD_ID:-}" ] && command -v runpodctl >/dev/null; then
  RUNPOD_POD_ID=$(tr '\0' '\n' < "$FIRST" | sed -n 's/^RUNPOD_POD_ID=//p') || true
  [ -n "$RUNPOD_POD_ID" ] || die "runpodctl is here, so this is a pod, but RUNPOD_POD_ID is not known: export it, or say --no-deadline and watch the clock yourself"
  export RUNPOD_POD_ID
fi
if [ "$DEADLINE" = 0 ]; then say "no deadline, as asked: this pod runs until somebody stops it"
elif [ -z "${RUNPOD_POD_ID:-}" ]; then say "no RUNPOD_POD_ID: this is no pod, no deadline is armed"
else
  [ "$DRY" = 1 ] || command -v runpodctl >/dev/null || die "runpodctl is missing, so the deadline could not stop this pod. Install it, or say --no-deadline and watch the clock yourself"
  arm_deadline
fi

# --- 2. where things will live
case "$HOME_DIR/" in
  "$(realpath -ms "$VOLUME")"/*) ;;
  *) [ "$OFF" = 1 ] || die "DEEPFAKE_NB_HOME=$HOME_DIR is not on the volume $VOLUME: checkpoints would be lost when the pod stops. Unset it, or say --off-volume" ;;
esac
check_mount() { # a folder of that name on the container's own disk is no volume
  [ -d "$VOLUME" ] || die "$VOLUME does not exist: attach a volume there, name it with --volume, or say --off-volume"
  [ "$(stat -c %d "$VOLUME")" != "$(stat -c %d /)" ] || die "$VOLUME lies on the container's disk, which is lost when the pod stops: attach a volume there, or say --off-volume"
}
if [ "$OFF" = 0 ]; then run check_mount; fi

# --- 3. Python and torch: what is there
command -v "$PYTHON" >/dev/null || die "there is no $PYTHON: name one with --python"
run "$PYTHON" -c 'import sys; sys.version_info>=(3,11) or sys.exit("setup_pod: Python 3.11 or newer is needed, this is "+sys.version.split()[0]+": name one with --python")'
PROBE='import importlib.util as u, importlib.metadata as m
print(m.version("torch") if u.find_spec("torch") else "none")'
if [ -x "$VENV/bin/python" ]; then TORCH=$("$VENV/bin/python" -c "$PROBE"); else TORCH=$("$PYTHON" -c "$PROBE"); fi
at_least() { # at_least 2.10 2.9.1 -> false: versions are no decimals
  [ "$2" != none ] && [ "$(printf '%s\n%s\n' "$1" "${2%%[+a-z]*}" | sort -V | head -n 1)" = "$1" ]
}
KEEP=0; if at_least 2.10 "$TORCH"; then KEEP=1; fi
if [ "$KEEP" = 1 ]; then say "torch $TORCH is here and stays"; else say "torch here: $TORCH; 2.10 or newer is needed"; fi

# --- 4. compiled kernels: what they would cost is said before anything is installed
if [ "$CUDA" = 1 ] && [ "$KEEP" = 1 ] && at_least 2.11 "$TORCH"; then
  JOBS=$(( $(nproc) < 8 ? $(nproc) : 8 ))
  say "no prebuilt kernels for torch $TORCH: compiling takes 720 to 1680 core minutes (15 to 35 min on 48 cores)"
  awk -v j="$JOBS" -v p="$PRICE" 'BEGIN{printf "# with %d jobs here: %.1f to %.1f hours, $%.2f to $%.2f at $%s an hour\n", j, 12/j, 28/j, 12/j*p, 28/j*p, p}'
  [ "$COMPILE" = 1 ] || [ "$DRY" = 1 ] || die "say --accept-compile to spend that, or leave --cuda-extra: the pure torch path gives the same numbers"
fi

# --- 5. install
cd "$ROOT"
run mkdir -p "$HOME_DIR/pack" "$HOME_DIR/store" "$HOME_DIR/checkpoints" "$HOME_DIR/ledger"
link_site() { # a virtual environment sees the packages of its base; of an environment it was made from, only through this
  "$PYTHON" -c 'import sys, sysconfig, glob
if sys.prefix!=sys.base_prefix:
    for d in glob.glob(sys.argv[1]+"/lib/python*/site-packages"): open(d+"/pod.pth","w").write(sysconfig.get_path("purelib")+"\n")' "$VENV"
}
if [ ! -x "$VENV/bin/python" ]; then run "$PYTHON" -m venv --system-site-packages "$VENV"; run link_site; fi
PY=$VENV/bin/python
if [ "$KEEP" = 0 ]; then
  run "$PY" -m pip install "$UV"
  if [ "$CUDA" = 1 ]; then run "$PY" -m uv pip install --python "$PY" --torch-backend=auto "${CUDA_TORCH[@]}"
  else run "$PY" -m uv pip install --python "$PY" --torch-backend=auto -r constraints-torch.txt; fi
fi
write_lock() { # torch as it is now, so that no later requirement can replace it
  "$PY" -c 'import importlib.util as u, importlib.metadata as m
for n in ("torch","torchvision","triton"):
    if u.find_spec(n): print(f"{n}=={m.version(n)}")' > "$LOCK.part"
  grep -q '^torch==' "$LOCK.part" || die "torch was not installed: see the messages above"
  mv "$LOCK.part" "$LOCK"
}
run write_lock
run "$PY" -m pip install -c constraints.txt -c "$LOCK" -e '.[dev]'
check_nvcc() { # the kernels' build asks for it even where a prebuilt wheel fits
  command -v nvcc >/dev/null || die "nvcc is missing: --cuda-extra needs a -devel image. Without it the pure torch path gives the same numbers"
  local cuda; cuda=$("$PY" -c 'import torch; print(torch.version.cuda)')
  nvcc --version | grep -q "release $cuda," || die "nvcc is not CUDA $cuda, which torch was built for: take an image where the two agree"
}
if [ "$CUDA" = 1 ]; then
  run check_nvcc
  run "$PY" -m pip install -c constraints.txt "${BUILD[@]}"
  run env MAX_JOBS="${JOBS:-4}" "$PY" -m pip install --no-build-isolation -c constraints.txt -c "$LOCK" -e '.[cuda]'
fi

# --- 6. what a shell needs, and the proof
put "$HOME_DIR/env.sh" <<TEXT
export DEEPFAKE_NB_HOME=$(printf %q "$HOME_DIR")
export TORCHINDUCTOR_CACHE_DIR=$(printf %q "$HOME_DIR/inductor")
export PATH=$(printf %q "$VENV/bin"):\$PATH
TEXT
run "$PY" -c 'import sys, torch, deepfake_nb
lock = dict(l.strip().split("==") for l in open(sys.argv[1]))
torch.__version__.split("+")[0]==lock["torch"].split("+")[0] or sys.exit("setup_pod: torch was replaced: "+torch.__version__+", the lock says "+lock["torch"])
sys.argv[2]=="" or torch.cuda.is_available() or sys.exit("setup_pod: a pod without a GPU that torch can use: torch "+torch.__version__)' "$LOCK" "${RUNPOD_POD_ID:-}"
if [ "$CUDA" = 1 ]; then run "$PY" -c 'import mamba_ssm'; fi
say "ready: . $(printf %q "$HOME_DIR/env.sh")"
