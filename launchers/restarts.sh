# Sourced by the launchers: run a command, again after a fault, and hand a wish to stop to the processes that train.
#
# Exit codes of switchdit/train.py, and of the launchers: 0 finished; 2 a mistake of the user, or data that is gone;
# 75 stopped by SIGTERM or SIGUSR1 with everything saved; 130 Ctrl-C; any other a fault.

SECONDS_BEFORE_RESTART=5
SECONDS_TO_SAVE=60 # of processes that their launch has left behind

# keep_running WORKERS COMMAND...
#   WORKERS  a command that, given the id of COMMAND's process, prints those of the processes that train
# Returns the exit code of COMMAND, but 75 where it was asked to stop before it had processes that train, 130 where
# Ctrl-C ended it in a fault, and 1 where it ended with 0 and left processes behind. After a wish to stop nothing starts
# again: a fault then is returned as it is, since not everything is saved.
keep_running() {
    local workers=$1 tries=0 asked='' unstarted='' interrupted code=0 child='' ended left
    shift
    # HUP: the terminal was closed, and may not be written to any more
    trap 'asked=USR1 interrupted=yes; stop_workers' TERM USR1 HUP
    trap 'asked=INT interrupted=yes; stop_workers' INT
    while true; do
        # a process group of its own: Ctrl-C would also reach DeepSpeed's launcher, which kills the others before they
        # can end by themselves
        set -m
        "$@" &
        child=$!
        set +m
        [ -z "$asked" ] || stop_workers # the signal came before there was a process to hand it to
        while true; do
            interrupted=''
            code=0
            wait "$child" || code=$?
            [ -n "$interrupted" ] || break
        done
        ended=$child child=''
        left=$(left_behind "$workers" "$ended")
        if [ -n "$left" ]; then
            warn "the launch ended with $(described "$code") and left processes behind: they are stopped"
            end_processes $left
            [ "$code" -ne 0 ] || code=1
        fi
        case $code in 0 | 2 | 75 | 130) return "$code" ;; esac
        [ "$asked" = INT ] && return 130
        [ -n "$unstarted" ] && return 75
        [ -z "$asked" ] && [ "$tries" -lt "${RESTARTS:-0}" ] || return "$code"
        tries=$((tries + 1))
        warn "the program ended with $(described "$code"); restart $tries of $RESTARTS in $SECONDS_BEFORE_RESTART seconds"
        sleep "$SECONDS_BEFORE_RESTART" & wait $! || true # a trap does not have to wait for the end of a wait
        [ "$asked" = INT ] && return 130
        [ -z "$asked" ] || return "$code"
        with_resume "$@"
        set -- "${words[@]}"
    done
}

# for the traps of keep_running: its signal to the processes that train; before there are any, the launch is ended
stop_workers() {
    local pids
    [ -n "$child" ] || return 0
    pids=$("$workers" "$child") || pids=''
    if [ -n "$pids" ]; then
        kill -"$asked" $pids 2>/dev/null || true
    else
        unstarted=yes
        kill -TERM -- "-$child" 2>/dev/null || true
    fi
}

# left_behind WORKERS CHILD: ids of the processes that CHILD, which has ended, has left. DeepSpeed's launcher ends with 0
# when the process that started the workers is killed.
left_behind() {
    local tries pids
    for tries in 1 2 3 4 5 6 7 8 9 10; do # helpers of Python end a moment after it
        pids=$(alive $(pgrep -g "$2") $("$1" "$2"))
        [ -n "$pids" ] || return 0
        sleep 0.2
    done
    echo "$pids"
}

# alive PID...: those that have not ended; one that nobody waits for stays as a zombie where the first process is no init
alive() { ps -eo pid=,stat= | awk -v pids=" $* " '$2 !~ /^Z/ && index(pids, " " $1 " ") {print $1}'; }

# end_processes PID...: they save and end; what cannot is killed
end_processes() {
    local deadline=$((SECONDS + SECONDS_TO_SAVE))
    kill -TERM "$@" 2>/dev/null || true
    while [ -n "$(alive "$@")" ]; do
        [ "$SECONDS" -lt "$deadline" ] || kill -KILL "$@" 2>/dev/null || true
        [ "$SECONDS" -lt $((deadline + 5)) ] || return 0 # in the kernel, where no signal reaches it
        sleep 0.2
    done
}

# deepspeed starts deepspeed.launcher.launch, which starts the workers: neither passes a signal on, both end at SIGUSR1
deepspeed_workers() {
    local launch
    launch=$(pgrep -d, -P "$1") && pgrep -P "$launch" -f -- '--local_rank='
}

# mpiexec passes SIGUSR1 and SIGINT on by itself, to all machines
mpi_workers() { echo "$1"; }

# with_resume WORD...: sets the array words to them, and adds --resume auto behind switchdit/train.py where the user did
# not say from where to continue
with_resume() {
    local word
    words=()
    for word in "$@"; do
        words+=("$word")
        case $word in
            --res*)
                words=("$@")
                return
                ;;
            switchdit/train.py | */switchdit/train.py) words+=(--resume auto) ;;
        esac
    done
}

# "code 247 (SIGKILL)": a shell reports signal N as 128 + N, DeepSpeed's launcher as 256 - N
described() {
    local number=0
    [ "$1" -gt 128 ] && [ "$1" -le 160 ] && number=$(($1 - 128))
    [ "$1" -ge 224 ] && number=$((256 - $1))
    echo "code $1$([ "$number" -eq 0 ] || echo " (SIG$(kill -l "$number"))")"
}

warn() { echo "$1" >&2 || true; }

# whole NAME VALUE LEAST: refuse what is no whole number of at least LEAST
whole() {
    case $2 in
        '' | *[!0-9]*) ;;
        *) [ "$2" -lt "$3" ] || return 0 ;;
    esac
    echo "error: $1 is '$2'; it must be a whole number of at least $3" >&2
    exit 2
}
