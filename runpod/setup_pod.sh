#!/usr/bin/env bash
# Make a fresh pod ready, or bring one up to date: run it as often as you like. It never replaces a torch >= 2.10 that the pod came with.
# The first thing it does is to arm the deadline after which the pod stops itself, whatever happens later. Each step is timed; past --minutes it fails with the step's name.
set -euo pipefail
NAME=setup_pod DRY=0 HOURS=20 DEADLINE=1 VOLUME=/workspace OFF=0 PYTHON=python3 CUDA=0 COMPILE=0 PRICE=0.39 MINUTES=5 DEV=0 WEIGHTS=()
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=deadline.sh
. "$ROOT/runpod/deadline.sh"
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$ROOT/runpod/lib.sh"

usage() { cat <<'TEXT'
Usage: runpod/setup_pod.sh [options]
  --dry-run           print every command, do nothing
  --hours H           stop the pod H hours after the first call (default 20: $7.80 at $0.39 an hour)
  --no-deadline       arm no deadline (you pay until you stop the pod yourself)
  --minutes M         fail, with the name of the step, when all of it takes longer (default 5; with --accept-compile no limit by default)
  --volume DIR        where the volume is mounted (default /workspace)
  --off-volume        allow DEEPFAKE_NB_HOME outside the volume: checkpoints are lost when the pod stops
  --python PY         Python 3.11 or newer, the one that has the pod's torch (default python3)
  --weights FILE[#SHA256]  pretrained weights, a file or an fsspec address; kept on the volume, checked (may be given several times)
  --dev               what building this book needs as well; a pod that trains does not
  --cuda-extra        compiled Mamba kernels: prebuilt wheels up to torch 2.10
  --accept-compile    with --cuda-extra and a newer torch: compile them, after the printed estimate
  --price D           dollars an hour, for the estimate (default 0.39)
  -h, --help
DEEPFAKE_NB_HOME must lie on the volume (default DIR/deepfake_nb).
TEXT
}
ASKED=''
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) DRY=1 ;;
    --hours) need "$@"; HOURS=$2; shift ;;
    --no-deadline) DEADLINE=0 ;;
    --minutes) need "$@"; MINUTES=$2; ASKED=1; shift ;;
    --volume) need "$@"; VOLUME=$2; shift ;;
    --off-volume) OFF=1 ;;
    --python) need "$@"; PYTHON=$2; shift ;;
    --weights) need "$@"; WEIGHTS+=("$2"); shift ;;
    --dev) DEV=1 ;;
    --cuda-extra) CUDA=1 ;;
    --accept-compile) COMPILE=1 ;;
    --price) need "$@"; PRICE=$2; shift ;;
    -h|--help) usage; exit 0 ;;
    *) die "unknown option '$1', see --help" ;;
  esac
  shift
done
for n in "$HOURS" "$PRICE" "$MINUTES"; do number "$n"; done
[ "$COMPILE" = 0 ] || [ -n "$ASKED" ] || MINUTES=600

HOME_DIR=$(realpath -ms "${DEEPFAKE_NB_HOME:-$VOLUME/deepfake_nb}")
VENV=$HOME_DIR/venv LOCK=$HOME_DIR/torch.lock
# Pinned here because they are needed before, or instead of, constraints.txt.
UV='uv==0.13.8' BUILD=('setuptools==80.9.0' 'wheel==0.45.1' 'ninja==1.13.0' packaging) CUDA_TORCH=('torch==2.10.0' 'torchvision==0.25.0')

# --- 1. the deadline, before anything that could fail or hang
stops

# Steps: what is done now, how long each took, and the end of all patience.
BEGAN=$(up); LIMIT=$(awk -v m="$MINUTES" 'BEGIN{x=int(60*m+.999); print (x>0 ? x : 1)}') STEP='' DOING='' SINCE=$BEGAN TOOK='' JOB=''
step() { # step NAME: the one before is over
  local now; now=$(up)
  [ -z "$STEP" ] || TOOK+="# $(printf '%5d s  %s' $(( now-SINCE )) "$STEP")"$'\n'
  STEP=$1 SINCE=$now
}
end_job() { if [ -n "$JOB" ]; then kill -KILL -- "-$JOB" 2>/dev/null; JOB=''; fi; }
trap 'end_job || true' EXIT
trap 'exit 143' TERM; trap 'exit 130' INT
late() { # too late: what ran is ended, with all that it started
  end_job || true
  step ''; printf '%s' "$TOOK" >&2
  die "the step '$DOING' was not done after $MINUTES minutes of set-up, so it was ended: money burns here and nothing learns. See what it said above; then take a pod with a faster network or disk, or give it longer (--minutes)"
}
run() { # print a command, then do it, as long as there is time
  show "$@"
  [ "$DRY" = 1 ] && return
  set -m; "$@" </dev/null & JOB=$!; set +m # a group of its own, so that all of it can be ended
  while kill -0 "$JOB" 2>/dev/null; do
    if [ $(( $(up)-BEGAN )) -ge "$LIMIT" ]; then DOING=$STEP; late; fi
    sleep .05
  done
  local code=0; wait "$JOB" || code=$?; JOB=''
  [ "$code" = 0 ] || { printf "%s: the step '%s' failed (exit %s)\n" "$NAME" "$STEP" "$code" >&2; exit "$code"; }
}

# --- 2. where things will live
step 'volume'
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
step 'python and torch: what is there'
command -v "$PYTHON" >/dev/null || die "there is no $PYTHON: name one with --python"
run "$PYTHON" -c 'import sys; sys.version_info>=(3,11) or sys.exit("setup_pod: Python 3.11 or newer is needed, this is "+sys.version.split()[0]+": name one with --python")'
PROBE='import importlib.util as u, importlib.metadata as m
print(m.version("torch") if u.find_spec("torch") else "none")'
ASK=$PYTHON; [ ! -x "$VENV/bin/python" ] || ASK=$VENV/bin/python
TORCH=$(timeout -k 5 "$LIMIT" "$ASK" -c "$PROBE") || die "$ASK cannot say which torch it has (exit $?, or longer than $MINUTES minutes)$([ "$ASK" = "$PYTHON" ] || echo ": delete $VENV and run this again")"
at_least() { # at_least 2.10 2.9.1 -> false: versions are no decimals
  [ "$2" != none ] && [ "$(printf '%s\n%s\n' "$1" "${2%%[+a-z]*}" | sort -V | head -n 1)" = "$1" ]
}
serves() { [ -z "${RUNPOD_POD_ID:-}" ] || [ "$DRY" = 1 ] || timeout -k 5 "$LIMIT" "$ASK" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }
KEEP=0
if ! at_least 2.10 "$TORCH"; then say "torch here: $TORCH; 2.10 or newer is needed"
elif ! serves; then say "torch $TORCH is here, but cannot use this pod's GPU: another one is installed beside it"
else KEEP=1; say "torch $TORCH is here and stays"; fi

# --- 4. compiled kernels: what they would cost is said before anything is installed
if [ "$CUDA" = 1 ] && [ "$KEEP" = 1 ] && at_least 2.11 "$TORCH"; then
  CORES=$(( $(nproc) < 8 ? $(nproc) : 8 ))
  say "no prebuilt kernels for torch $TORCH: compiling takes 720 to 1680 core minutes (15 to 35 min on 48 cores)"
  awk -v j="$CORES" -v p="$PRICE" 'BEGIN{printf "# with %d jobs here: %.1f to %.1f hours, $%.2f to $%.2f at $%s an hour\n", j, 12/j, 28/j, 12/j*p, 28/j*p, p}'
  [ "$COMPILE" = 1 ] || [ "$DRY" = 1 ] || die "say --accept-compile to spend that, or leave --cuda-extra: the pure torch path gives the same numbers"
fi

# --- 5. install
step 'environment'
cd "$ROOT"
run mkdir -p "$HOME_DIR/pack" "$HOME_DIR/store" "$HOME_DIR/checkpoints" "$HOME_DIR/ledger" "$HOME_DIR/pod"
alone() { flock 8 || say "no locks on this file system: set up one pod of a volume at a time"; } # waits as long as there is time. Between pods it holds as far as the volume's locks do
if [ "$DRY" = 0 ]; then exec 8>"$HOME_DIR/pod/setup.lock"; fi
run alone
link_site() { # a virtual environment sees the packages of its base; of an environment it was made from, only through this
  "$PYTHON" -c 'import sys, sysconfig, glob
if sys.prefix!=sys.base_prefix:
    for d in glob.glob(sys.argv[1]+"/lib/python*/site-packages"): open(d+"/pod.pth","w").write(sysconfig.get_path("purelib")+"\n")' "$VENV"
}
if [ ! -x "$VENV/bin/python" ]; then run "$PYTHON" -m venv --system-site-packages "$VENV"; run link_site; fi
PY=$VENV/bin/python
if [ "$KEEP" = 0 ]; then
  step 'install torch'
  run "$PY" -m pip install "$UV"
  if [ "$CUDA" = 1 ]; then run "$PY" -m uv pip install --python "$PY" --torch-backend=auto "${CUDA_TORCH[@]}"
  else run "$PY" -m uv pip install --python "$PY" --torch-backend=auto -r constraints-torch.txt; fi
fi
step 'install the rest'
write_lock() { # torch as it is now, so that no later requirement can replace it
  "$PY" -c 'import importlib.util as u, importlib.metadata as m
for n in ("torch","torchvision","triton"):
    if u.find_spec(n): print(f"{n}=={m.version(n)}")' > "$LOCK.part"
  grep -q '^torch==' "$LOCK.part" || die "torch was not installed: see the messages above"
  mv "$LOCK.part" "$LOCK"
}
run write_lock
if [ "$DEV" = 1 ]; then WHAT=(-e '.[dev]'); else WHAT=(-e '.[remote]' jupyterlab); fi # a pod trains, ships and shows Lab; it does not build the book
run "$PY" -m pip install "${BUILD[@]:0:2}" # what builds this package is pinned as well: pip would fetch the newest
run "$PY" -m pip install --no-build-isolation -c constraints.txt -c "$LOCK" "${WHAT[@]}"
check_nvcc() { # the kernels' build asks for it even where a prebuilt wheel fits
  command -v nvcc >/dev/null || die "nvcc is missing: --cuda-extra needs a -devel image. Without it the pure torch path gives the same numbers"
  local cuda; cuda=$("$PY" -c 'import torch; print(torch.version.cuda)')
  nvcc --version | grep -q "release $cuda," || die "nvcc is not CUDA $cuda, which torch was built for: take an image where the two agree"
}
if [ "$CUDA" = 1 ]; then
  step 'compiled kernels'
  run check_nvcc
  run "$PY" -m pip install -c constraints.txt "${BUILD[@]}"
  run env MAX_JOBS="${CORES:-4}" "$PY" -m pip install --no-build-isolation -c constraints.txt -c "$LOCK" -e '.[cuda]'
fi

# --- 6. what a shell needs, and the proof
step 'proof: imports and GPU'
put "$HOME_DIR/env.sh" <<TEXT
export DEEPFAKE_NB_HOME=$(printf %q "$HOME_DIR")
export TORCHINDUCTOR_CACHE_DIR=$(printf %q "$HOME_DIR/inductor")
export PATH=$(printf %q "$VENV/bin"):\$PATH
TEXT
run "$PY" -c 'import sys, torch, deepfake_nb, deepfake_nb.guard
lock = dict(l.strip().split("==") for l in open(sys.argv[1]))
torch.__version__.split("+")[0]==lock["torch"].split("+")[0] or sys.exit("setup_pod: torch was replaced: "+torch.__version__+", the lock says "+lock["torch"])
if sys.argv[2]:
    torch.cuda.is_available() or sys.exit("setup_pod: a pod without a GPU that torch can use: torch "+torch.__version__)
    x = torch.ones(64, 64, device="cuda"); float((x@x).sum())==64**3 or sys.exit("setup_pod: this GPU cannot multiply: "+torch.cuda.get_device_name())
    print("# GPU:", torch.cuda.get_device_name())' "$LOCK" "${RUNPOD_POD_ID:-}"
if [ "$CUDA" = 1 ]; then run "$PY" -c 'import mamba_ssm'; fi
step 'weights and sample pack'
run env DEEPFAKE_NB_HOME="$HOME_DIR" "$PY" -m deepfake_nb.guard cache "${WEIGHTS[@]}"
step ''
[ "$DRY" = 1 ] || { say "ready after $(( $(up)-BEGAN )) s:"; printf '%s' "$TOOK"; }
say "ready: . $(printf %q "$HOME_DIR/env.sh")"
