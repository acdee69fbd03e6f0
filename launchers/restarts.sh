# Sourced by the launchers: run a command, again after a fault, and hand a wish to stop to the processes that train.
#
# Exit codes of switchdit/train.py, and of the launchers: 0 finished; 2 a mistake of the user, or data that is gone;
# 75 stopped by SIGTERM or SIGUSR1 with everything saved; 130 Ctrl-C; any other a fault.

SECONDS_BEFORE_RESTART=5

# keep_running WORKERS COMMAND...
#   WORKERS  a command that, given the id of COMMAND's process, prints those of the processes that train
# Returns the exit code of COMMAND, but 75 or 130 where this script was asked to stop and COMMAND ended in a fault.
keep_running() {
    local workers=$1 tries=0 asked='' interrupted code=0 child='' resume=()
    shift
    trap 'asked=USR1 interrupted=yes; stop_workers "$workers" "$child" USR1' TERM USR1 HUP
    trap 'asked=INT interrupted=yes; stop_workers "$workers" "$child" INT' INT
    while true; do
        # a process group of its own: Ctrl-C would also reach DeepSpeed's launcher, which kills the others before they
        # can end by themselves
        set -m
        "$@" "${resume[@]}" &
        child=$!
        set +m
        while true; do
            interrupted=''
            code=0
            wait "$child" || code=$?
            [ -n "$interrupted" ] || break
        done
        child=''
        case $code in 0 | 2 | 75 | 130) return "$code" ;; esac
        [ "$asked" = INT ] && return 130
        [ -n "$asked" ] && return 75
        [ "$tries" -lt "${RESTARTS:-0}" ] || return "$code"
        tries=$((tries + 1))
        echo "the program ended with $(described "$code"); restart $tries of $RESTARTS in $SECONDS_BEFORE_RESTART seconds" >&2
        sleep "$SECONDS_BEFORE_RESTART" & wait $! || true # a trap does not have to wait for the end of a wait
        [ "$asked" = INT ] && return 130
        [ -n "$asked" ] && return 75
        read -ra resume <<<"$(resume_options "$@")"
    done
}

# stop_workers WORKERS CHILD SIGNAL: the signal to the processes that train; before there are any, the launch is ended
stop_workers() {
    local pids
    [ -n "$2" ] || return 0
    pids=$("$1" "$2") || pids=''
    if [ -n "$pids" ]; then
        kill -"$3" $pids 2>/dev/null || true
    else
        kill -TERM -- "-$2" 2>/dev/null || true
    fi
}

# deepspeed starts deepspeed.launcher.launch, which starts the workers: neither passes a signal on, both end at SIGUSR1
deepspeed_workers() {
    local launch
    launch=$(pgrep -d, -P "$1") && pgrep -P "$launch" -f -- '--local_rank='
}

# mpiexec passes SIGUSR1 and SIGINT on by itself, to all machines
mpi_workers() { echo "$1"; }

# what makes a training that is started again continue, where the user did not say from where
resume_options() {
    local word trains=''
    for word in "$@"; do
        case $word in
            --resume | --resume=*) return 0 ;;
            switchdit/train.py | */switchdit/train.py) trains=yes ;;
        esac
    done
    [ -z "$trains" ] || echo "--resume auto"
}

# "code 247 (SIGKILL)": a shell reports signal N as 128 + N, DeepSpeed's launcher as 256 - N
described() {
    local number=0
    [ "$1" -gt 128 ] && [ "$1" -le 160 ] && number=$(($1 - 128))
    [ "$1" -ge 224 ] && number=$((256 - $1))
    echo "code $1$([ "$number" -eq 0 ] || echo " (SIG$(kill -l "$number"))")"
}

# whole NAME VALUE LEAST: refuse what is no whole number of at least LEAST
whole() {
    case $2 in
        '' | *[!0-9]*) ;;
        *) [ "$2" -lt "$3" ] || return 0 ;;
    esac
    echo "error: $1 is '$2'; it must be a whole number of at least $3" >&2
    exit 2
}
