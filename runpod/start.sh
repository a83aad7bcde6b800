#!/usr/bin/env bash
# The first command of a pod, or the one you type over SSH: from here on the pod sets itself up, works, ships what it learned, and ends.
# Four layers can end it, each alone: (1) the deadline, (2) the runner's last act, (3) the idle watchdog, (4) the sweep from your laptop.
set -uo pipefail
NAME=start DRY=0 HOURS=20 PRICE=0.39 GPU='RTX 4090' VOLUME=/workspace MINUTES=5 IDLE=20 MARGIN=10 GRACE=60 PORT=8888 SHIP='' DEADLINE=1 LAB=1 PLAN=1 STAY=0 TERMINATE=0
SETUP=() LABARGS=() KEEP=() LET=()
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
# shellcheck source-path=SCRIPTDIR source=deadline.sh
. "$HERE/deadline.sh"
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$HERE/lib.sh"

on_exit() { if [ $$ = 1 ] && [ "$DRY" = 0 ] && know_pod; then echo "# the first command of this pod ends: a container that exits is started again and costs, so the pod is stopped"; (switch 0); fi; }
trap on_exit EXIT

usage() { cat <<'TEXT'
Usage: runpod/start.sh [options] [-- COMMAND ...]
Without COMMAND: the five-dollar plan, with its films in DIR/videos, its gate in DIR/gate, and DIR/convnextv2_base.safetensors.
  --dry-run           print every command, do nothing
  --hours H           stop the pod H hours after the first call (default 20: $7.80 at $0.39 an hour). A ceiling, not a plan: the pod ends as soon
                      as its plan has ended. The five-dollar plan takes 14.6 h ($5.70) with cutting, gate and evaluations, and a little under 20 h if the gate asks for more three times
  --no-deadline       arm no deadline (you pay until you stop the pod yourself)
  --price D           dollars an hour of this pod, for the plan's ledger too (default 0.39)
  --gpu NAME          its card, as the plan knows it (default 'RTX 4090')
  --volume DIR        where the volume is mounted (default /workspace)
  --minutes M         set-up may take this long (default 5)
  --idle-minutes M    stop after so long without GPU use, lease or busy kernel (default 20)
  --margin M          end the plan so many minutes before the deadline, to ship (default 10)
  --grace S           seconds between SIGTERM and SIGKILL for the plan (default 60)
  --ship PLACE        where results go: a folder or an fsspec address (default DEEPFAKE_NB_HOME/shipped)
  --keep-secret NAME  a variable that set-up and the plan are given although its name says secret (for example of an s3:// archive; may be given several times)
  --no-plan           no plan: JupyterLab only
  --stay              when the plan has ended, leave the stop to the deadline and the watchdog (a set-up that fails stops the pod all the same)
  --terminate         remove the pod instead of stopping it, if the results arrived, were compared, and lie where the pod's end does not touch them:
                      at an address, or on a network volume (RUNPOD_VOLUME_ID is set)
  --no-lab, --port N, --lab-proxy WORDS      as in runpod/lab.sh
  --off-volume, --python PY, --weights FILE, --dev, --cuda-extra, --accept-compile      as in runpod/setup_pod.sh
  -h, --help
TEXT
}
ARGS=("$@")
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) DRY=1 ;;
    --hours) need "$@"; HOURS=$2; shift ;;
    --no-deadline) DEADLINE=0 ;;
    --price) need "$@"; PRICE=$2; shift ;;
    --gpu) need "$@"; GPU=$2; shift ;;
    --volume) need "$@"; VOLUME=$2; shift ;;
    --minutes) need "$@"; MINUTES=$2; shift ;;
    --idle-minutes) need "$@"; IDLE=$2; shift ;;
    --margin) need "$@"; MARGIN=$2; shift ;;
    --grace) need "$@"; GRACE=$2; shift ;;
    --ship) need "$@"; SHIP=$2; shift ;;
    --keep-secret) need "$@"; KEEP+=(--keep "$2") LET+=("$2"); shift ;;
    --no-plan) PLAN=0 ;;
    --stay) STAY=1 ;;
    --terminate) TERMINATE=1 ;;
    --no-lab) LAB=0 ;;
    --port) need "$@"; PORT=$2; shift ;;
    --lab-proxy) LABARGS+=("$1" "${2:-}"); shift $(( $# > 1 ? 1 : 0 )) ;;
    --off-volume|--dev|--cuda-extra|--accept-compile) SETUP+=("$1") ;;
    --python|--weights) need "$@"; SETUP+=("$1" "$2"); shift ;;
    -h|--help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option '$1', see --help" ;;
  esac
  shift
done
for n in "$HOURS" "$PRICE" "$MINUTES" "$IDLE" "$MARGIN" "$GRACE"; do number "$n"; done
DRYARG=(); [ "$DRY" = 0 ] || DRYARG=(--dry-run)

# Typed in a terminal, it must outlive it: a connection that is lost would end everything but the deadline.
if [ -t 1 ] && [ "$DRY" = 0 ]; then
  LOG=${DEEPFAKE_NB_LOG:-/tmp/deepfake_nb.start.log}
  setsid nohup bash "${BASH_SOURCE[0]}" "${ARGS[@]}" >>"$LOG" 2>&1 </dev/null &
  say "it runs on without this terminal; ctrl-C ends only this view of $LOG"
  exec tail -n +1 -F --pid=$! "$LOG"
fi

HOME_DIR=$(realpath -ms "${DEEPFAKE_NB_HOME:-$VOLUME/deepfake_nb}") BASE=${DEEPFAKE_NB_BASE_START:-/start.sh}
export DEEPFAKE_NB_HOME=$HOME_DIR

# --- one start.sh a pod: what a second one could end, or give a deadline, is the first one's work. Nothing here touches the volume, which may hang
only_one() { { exec 9>"$ARMED.lock"; } 2>/dev/null && flock -n -E 75 9; } # 75: there is another. (Descriptor 9 is closed for all that outlives this process)
plan_here() { # a plan outlives a start.sh that was killed (guard.py's `runners_of` looks for the same)
  local p; for p in $(grep -lszxF deepfake_nb.guard /proc/[0-9]*/cmdline); do
    if [[ $(tr '\0 ' ' _' <"$p") = *' deepfake_nb.guard run '* ]] && grep -qszxF "DEEPFAKE_NB_HOME=$HOME_DIR" "${p%/*}/environ"; then return 0; fi
  done 2>/dev/null; return 1
}
gives_way() { say "$1 is at work here already: see the container's log, or ${DEEPFAKE_NB_LOG:-/tmp/deepfake_nb.start.log}. For a plan beside it: python -m deepfake_nb.guard run --dest PLACE --stay -- COMMAND"; exit 0; }
if [ "$DRY" = 0 ]; then
  only_one; case $? in 0) ;; 75) gives_way start.sh ;; *) say "no lock at $ARMED.lock: start.sh goes on, and would not see another one" ;; esac
  if plan_here; then gives_way 'a plan'; fi
fi

# --- 1. the deadline, before anything that could fail or hang
stops 9>&-

mapfile -t HIDE < <(hidden); mapfile -t HIDE_SET < <(hidden "${LET[@]}")
bare() { exec env "${HIDE[@]}" "$@"; } # without secrets; in the background only
with_named() { exec env "${HIDE_SET[@]}" "$@"; } # the same, but for what was named
keep_deadline() { while :; do sleep "$AGAIN"; arm_deadline "$HOURS" >/dev/null; done; } # brings back one that was killed
rest() { while :; do sleep 60 9>&- & wait $!; done; } # until the end of the pod
JOBS=()
in_back() { show "$@"; if [ "$DRY" = 0 ]; then "$@" 9>&- & JOBS+=($!); fi; }
if [ "$DEADLINE$DRY" = 10 ] && [ -n "${RUNPOD_POD_ID:-}" ]; then keep_deadline 9>&- & JOBS+=($!); fi

WATCHED=0 # --stay is heard once there is a watchdog
finish() { # nothing more to do: the same switch as the deadline's, at once
  say "$1"
  if [ "$DRY" = 1 ]; then return; fi
  if [ -z "${RUNPOD_POD_ID:-}" ]; then say "this is no pod: nothing to stop"; kill "${JOBS[@]}" 2>/dev/null; exit "${2:-1}"; fi
  if [ "$STAY$WATCHED" = 11 ]; then say "--stay: the deadline and the watchdog will stop it"; rest; fi
  (switch 0)
}

# --- 2. the image's own start: sshd. Its Jupyter, which would listen on every address, is not started (no JUPYTER_PASSWORD).
if [ ! -x "$BASE" ]; then say "no $BASE in this image: nothing else to start"
elif tr '\0' '\n' </proc/1/cmdline | grep -qxF -- "$BASE"; then say "$BASE runs already"
else in_back bare "$BASE"; fi

# --- 3. set-up
if [ $# = 0 ] && [ "$PLAN" = 1 ]; then SETUP+=(--weights "$VOLUME/convnextv2_base.safetensors"); fi # missed now, not in an hour
DEADLINEARG=(--hours "$HOURS"); [ "$DEADLINE" = 1 ] || DEADLINEARG=(--no-deadline)
SET=(bash "$HERE/setup_pod.sh" "${DRYARG[@]}" "${DEADLINEARG[@]}" --price "$PRICE" --volume "$VOLUME" --minutes "$MINUTES" "${SETUP[@]}")
show "${SET[@]}"
with_named "${SET[@]}" 9>&- & SETTING=$!
trap 'kill -TERM $SETTING; finish "a signal during set-up: stopping" 143' TERM INT
wait $SETTING; CODE=$?
if [ "$CODE" != 0 ]; then [ "$DRY" = 0 ] || exit "$CODE"; finish "set-up failed (exit $CODE), so there is nothing to do here: stopping" "$CODE"; fi
trap - TERM INT
PY=$HOME_DIR/venv/bin/python
cd "$HOME_DIR" 2>/dev/null || [ "$DRY" = 1 ] || finish "$HOME_DIR is gone" 1 # records go to runs/ on the volume
# shellcheck source=/dev/null
if [ -f "$HOME_DIR/env.sh" ]; then . "$HOME_DIR/env.sh"; fi

# --- 4. JupyterLab, on 127.0.0.1
if [ "$LAB" = 1 ]; then in_back bash "$HERE/lab.sh" "${DRYARG[@]}" --volume "$VOLUME" --port "$PORT" "${LABARGS[@]}"; if [ "$DRY" = 1 ]; then bash "$HERE/lab.sh" "${DRYARG[@]}" --volume "$VOLUME" --port "$PORT" "${LABARGS[@]}" || exit 1; fi; fi

# --- 5. the idle watchdog; if it dies, it is started again; if nobody heard it say stop, this says it
keep_watch() { while :; do "$@" && (switch 0); say "the watchdog ended ($?), it is started again"; sleep "$RETRY"; done; }
if [ -n "${RUNPOD_POD_ID:-}" ] || [ "$DRY" = 1 ]; then
  in_back keep_watch "$PY" -m deepfake_nb.guard watch --minutes "$IDLE" --tries 6 --lab "http://127.0.0.1:$PORT" --token-file "$HOME_DIR/pod/token"
  WATCHED=1
fi

# --- 6. the plan, and whatever its ending: ship, compare, stop
if [ "$PLAN" = 0 ]; then say "no plan, as asked"; [ "$DRY" = 1 ] || rest; exit 0; fi
[ $# -gt 0 ] || set -- "$PY" -m deepfake_nb.plan run five_dollars -p "videos=$VOLUME/videos" -p "gate_videos=$VOLUME/gate" -p "weights=$VOLUME/convnextv2_base.safetensors" -p "gpu=$GPU" -p "price=$PRICE"
LIMIT=(); LEFT=$(deadline_left)
if [ "$DRY" = 1 ] && [ "$DEADLINE" = 1 ] && [ -n "${RUNPOD_POD_ID:-}" ]; then LEFT=$(seconds_of "$HOURS"); fi
if [ -n "$LEFT" ]; then LIMIT=(--limit "$(awk -v l="$LEFT" -v m="$MARGIN" 'BEGIN{x=l-60*m; print (x>l/2 ? x : l/2)}')"); fi
END=(); [ "$TERMINATE" = 0 ] || END+=(--terminate); [ "$STAY" = 0 ] || END+=(--stay)
RUN=("$PY" -m deepfake_nb.guard run --tries 6 --dest "${SHIP:-$HOME_DIR/shipped}" --grace "$GRACE" "${LIMIT[@]}" "${KEEP[@]}" "${END[@]}" -- "$@")
show "${RUN[@]}"
[ "$DRY" = 0 ] || exit 0
"${RUN[@]}" 9>&- & GUARD=$!
trap 'kill -TERM $GUARD' TERM INT
wait $GUARD; CODE=$?
while kill -0 $GUARD 2>/dev/null; do wait $GUARD; CODE=$?; done
finish "the runner ended ($CODE) and this pod is still there" "$CODE"
