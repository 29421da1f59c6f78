# shellcheck shell=bash
#
# What the job scripts share: what Slurm knows of a job, how a job queues again, and what the
# codes of its ranks come to.

# fact NAME: a field of `scontrol show job` for this job, as JobState; empty if there is none.
# Variables such as SLURM_RESTART_COUNT are no substitute: a job that is submitted from another
# job inherits that one's.
fact() {
    local all try
    for ((try = 0; try < 60; try++)); do
        if all=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null); then
            sed -n "s/^JobId=$SLURM_JOB_ID \(.* \)\?$1=\([^ ]*\).*/\2/p" <<<"$all"
            return
        fi
        sleep 10 # a controller that restarts
    done
}

# The last task of an array has the array's own number, so only NUMBER_TASK means that task.
_job=$(fact ArrayTaskId)
_job=${_job:+$(fact ArrayJobId)_$_job}
_job=${_job:-$SLURM_JOB_ID}

SLURM_RESTART_COUNT=$(fact Restarts)
SLURM_RESTART_COUNT=${SLURM_RESTART_COUNT:-0}
export SLURM_RESTART_COUNT

say() { echo "$(date '+%F %T') job $_job: $*"; }

# requeue WHY CODE: queue this job again, which ends it; exit with CODE where that cannot be.
requeue() {
    ended_by_slurm "$2"
    if [[ $(fact Requeue) == 1 ]]; then
        say "$1: queueing again"
        scontrol requeue "$_job" && exit 0
    fi
    say "$1: Slurm may not queue this job again (--no-requeue?); to go on, submit it again"
    exit "$2"
}

# ended_by_slurm CODE: exit with CODE if Slurm has ended this job, and say how; else return.
ended_by_slurm() {
    local state restarts
    state=$(fact JobState) restarts=$(fact Restarts)
    # The controller may call the next start RUNNING before this script has come to its end.
    if ((${restarts:-0} > SLURM_RESTART_COUNT)); then
        say "ended by Slurm, which queues it again"
        exit "$1"
    fi
    [[ -n $state && $state != RUNNING ]] || return 0
    if [[ -n ${SLURM_JOB_END_TIME:-} ]] && (($(date +%s) >= SLURM_JOB_END_TIME)); then
        say "out of time"
    else
        say "cancelled"
    fi
    exit "$1"
}

# srun returns the highest exit code of its ranks, and 75 is higher than that of most faults. So
# each rank leaves an empty file named after its own code: bash -c "$leave_code" FOLDER COMMAND …
# shellcheck disable=SC2016,SC2034
leave_code='trap : TERM INT; "$@"; code=$?; { : >"$0/$code"; } 2>/dev/null; exit "$code"'

# deciding_code FOLDER CODE: of the codes that ranks have left; CODE if none has left any. A
# setting to mend counts before a fault, a fault before a stop in time. A rank that srun ended
# since another was gone has left none.
deciding_code() {
    local code
    for code in 2 {255..76} {74..3} 1 75 0; do
        if [[ -e $1/$code ]]; then
            echo "$code"
            return
        fi
    done
    echo "$2"
}
