# shellcheck shell=bash
# What the scripts of this folder share. They set NAME and DRY; `stops` reads HOURS, PRICE and DEADLINE as well.
say()  { printf '# %s\n' "$*"; }
die()  { printf '%s: %s\n' "$NAME" "$*" >&2; exit 1; }
need() { [ -n "${2:-}" ] || die "$1 needs a value, see --help"; }
number() { [[ $1 =~ ^([0-9]+([.][0-9]*)?|[.][0-9]+)$ ]] || die "'$1' is not a number"; }

show() { # a command, so that it can be pasted
  local a; printf '+'
  for a in "$@"; do if [[ $a =~ ^[A-Za-z0-9_./:=,@+-]+$ ]]; then printf ' %s' "$a"; else printf ' %s' "${a@Q}"; fi; done
  printf '\n'
  if [ "$(type -t "$1")" = function ]; then declare -f "$1" | sed 's/^/    /'; fi
}
put() { # write standard input to a file, whole or not at all
  local text; text=$(cat)
  printf '+ write %q\n' "$1"; printf '%s\n' "$text" | sed 's/^/    /'
  [ "$DRY" = 1 ] || { printf '%s\n' "$text" >"$1.part"; mv "$1.part" "$1"; }
}
arm() { # arm HOURS: or say why not
  if ! know_pod; then
    if command -v runpodctl >/dev/null; then die "runpodctl is here, so this is a pod, but RUNPOD_POD_ID is not known: export it, or say --no-deadline and watch the clock yourself"; fi
    say "no RUNPOD_POD_ID: this is no pod, no deadline is armed"; return
  fi
  if [ "$DRY" = 1 ]; then printf '%s >>%q 2>&1 </dev/null &\n' "$(show setsid nohup bash -c "$(switch_text); switch $(seconds_of "$1")" deepfake_nb-deadline)" "$ARMED.log"; return; fi
  is_armed || can_stop || die "runpodctl is missing, and curl or RUNPOD_API_KEY as well, so the deadline could not stop this pod. Bring one of them, or say --no-deadline and watch the clock yourself"
  arm_deadline "$1" || die "this pod would never stop itself: see above, and the deadline's log"
}
stops() { # what ends this pod, said before anything else: the deadline and what it costs at worst
  know_pod || true # for the other layers, whatever is said of this one
  if [ "$DEADLINE" = 0 ]; then say "no deadline, as asked: this pod costs \$$PRICE an hour until its plan ends, the watchdog finds it idle, or you stop it"; return; fi
  say "at worst this costs \$$(awk -v h="$HOURS" -v p="$PRICE" 'BEGIN{printf "%.2f", h*p}'): $HOURS h at \$$PRICE an hour, and its disks; with a plan that ends, less"
  arm "$HOURS"
}
SECRET='KEY|TOKEN|SECRET|PASSW|CREDENTIAL' # names of variables that no plan, notebook or Lab is given; PUBLIC_KEY is none (`is_secret` of chapter 1 has the same words)
hidden() { # hidden [NAME ...]: words for env that take them away, but not those named
  local n; for n in $(compgen -e); do if [[ ${n^^} =~ $SECRET && " PUBLIC_KEY $* " != *" $n "* ]]; then printf -- '-u\n%s\n' "$n"; fi; done
}
