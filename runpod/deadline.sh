# shellcheck shell=bash
# Layer 1 of four: the deadline after which a pod stops itself, whatever happens later. Needs no Python, no network until then, no volume, and not this file either.
# start.sh and setup_pod.sh source it; the first command of a pod carries its text (chapter 53), without lines that begin with #.
ARMED=${DEEPFAKE_NB_DEADLINE_FILE:-/tmp/deepfake_nb.deadline} RETRY=${DEEPFAKE_NB_DEADLINE_RETRY:-15} AGAIN=${DEEPFAKE_NB_DEADLINE_AGAIN:-60}
FIRST=${DEEPFAKE_NB_POD_ENVIRON:-/proc/1/environ} API=${DEEPFAKE_NB_RUNPOD_API:-https://api.runpod.io/v2}

up() { local u _; read -r u _ </proc/uptime; echo "${u%.*}"; } # s on a clock that nobody can set
boot() { local s; s=$(</proc/1/stat); read -ra s <<<"${s##*) }"; echo "$(</proc/sys/kernel/random/boot_id)-${s[19]}"; } # this start of the container: a pod that was stopped gets a new deadline
of_first() { { tr '\0' '\n' <"$FIRST"; } 2>/dev/null | sed -n "s/^$1=//p"; } # an SSH session lacks the container's variables

attempt() { # one try, three ways, until one accepts, or all of them (attempt all); the key is in no command line and in no line of the log
  local key=${RUNPOD_API_KEY:-} way out words good=1
  [ -n "$key" ] || key=$(of_first RUNPOD_API_KEY)
  key=${key//[$' \t\r\n']/}
  [ -z "$key" ] || export RUNPOD_API_KEY=$key
  for way in 'runpodctl pod stop' 'runpodctl stop pod' 'REST'; do
    read -ra words <<<"$way"
    if [ "$way" != REST ]; then out=$(timeout -k 2 15 "${words[@]}" "$RUNPOD_POD_ID" 2>&1)
    elif [ -z "$key" ]; then out='no key'; false
    else out=$(printf 'header = "Authorization: Bearer %s"\n' "$key" | timeout -k 2 15 curl -qsS -K - -f -o /dev/null -X POST -A deepfake-nb -H 'Content-Type: application/json' -d '{"action":"stop"}' "$API/pods/$RUNPOD_POD_ID/action" 2>&1)
    fi && { echo "$(date -u +%FT%TZ) $way: accepted"; good=0; if [ -n "${1:-}" ]; then continue; else return 0; fi; }
    out=${out//$'\n'/ }; [ -z "$key" ] || out=${out//"$key"/[key]}
    echo "$(date -u +%FT%TZ) $way: ${out:0:300}"
  done
  return $good
}
switch() { # switch SECONDS: wait, then ask until this process ends together with its pod; accepted is not stopped, so it asks again
  trap '' HUP INT TERM
  local n=$1 end s all=''; end=$(( $(up) + $1 ))
  while [ "$n" -gt 0 ] && [ "$(up)" -lt "$end" ]; do s=$(( n < 30 ? n : 30 )); sleep "$s" && n=$(( n-s )); done # a sleep that is killed counts for nothing
  while :; do if attempt $all; then all=all; sleep "$AGAIN"; else sleep "$RETRY"; fi; done
}
switch_text() { declare -p RETRY AGAIN FIRST API; declare -f up of_first attempt switch; } # all of it, as text: it runs from memory

know_pod() { # the names of the pod and of its network volume, of the container if this shell lacks them; 1: this is no pod
  [ -n "${RUNPOD_VOLUME_ID:-}" ] || RUNPOD_VOLUME_ID=$(of_first RUNPOD_VOLUME_ID)
  [ -n "${RUNPOD_POD_ID:-}" ] || RUNPOD_POD_ID=$(of_first RUNPOD_POD_ID)
  [ -n "$RUNPOD_POD_ID" ] || return 1
  export RUNPOD_POD_ID RUNPOD_VOLUME_ID
}
can_stop() { command -v runpodctl >/dev/null || { command -v curl >/dev/null && [ -n "${RUNPOD_API_KEY:-}$(of_first RUNPOD_API_KEY)" ]; }; }
seconds_of() { awk -v h="$1" 'BEGIN{printf "%d", h*3600+.5}'; }
NOTED='' # what could not be written to $ARMED: a disk that is full, or read-only, must not cost the deadline
noted() { # "END PID" of the switch of this start of the container; nothing if there is none
  local text end stamp pid
  for text in "$NOTED" "$(cat "$ARMED" 2>/dev/null)"; do
    read -r end stamp pid <<<"$text"
    if [ "$stamp" = "$(boot)" ]; then echo "$end $pid"; return; fi
  done
}
deadline_left() { # s until the deadline that is armed; nothing if there is none of this start
  local end; read -r end _ <<<"$(noted)"
  [ -z "$end" ] || echo $(( end > $(up) ? end-$(up) : 0 ))
}
is_armed() { # does the switch that was noted still wait? Just forked, it still has its parent's command line, which may speak of it: so whole words
  local pid words=(); read -r _ pid <<<"$(noted)"
  [ -n "$pid" ] && { mapfile -d '' -t words <"/proc/$pid/cmdline"; } 2>/dev/null && [ "${words[0]:-} ${words[*]: -1}" = 'bash deepfake_nb-deadline' ]
}
arm_deadline() { # arm_deadline HOURS: a second call buys no time, and brings back a switch that was killed; 1: there is no switch
  local left log=$ARMED.log _; left=$(deadline_left)
  if [ -n "$left" ] && is_armed; then echo "# the deadline is armed already: this pod stops itself in $left s"; return; fi
  left=${left:-$(seconds_of "$1")}
  { : >>"$log"; } 2>/dev/null || log=/dev/null
  setsid nohup bash -c "$(switch_text); switch $left" deepfake_nb-deadline >>"$log" 2>&1 </dev/null &
  NOTED="$(( $(up) + left )) $(boot) $!"
  { echo "$NOTED" >"$ARMED.part" && mv "$ARMED.part" "$ARMED"; } 2>/dev/null || { rm -f "$ARMED.part" 2>/dev/null; echo "# $ARMED cannot be written: only this process knows the deadline"; }
  for _ in {1..30}; do
    if is_armed; then echo "# this pod stops itself in $left s: $ARMED, $log"; return; fi
    sleep .1
  done
  echo "# the deadline is NOT armed: its process ended at once"; return 1
}
