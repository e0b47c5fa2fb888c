#!/usr/bin/env bash
# Every run behind the tables and figures of the slides, and then the tables.
#
#   bash run_all.sh                        the slides' study: CINIC-10, seeds 1 2 3
#   bash run_all.sh --smoke                every table, tiny, on generated images: minutes
#   bash run_all.sh --only initial,moe --data path/to/folder --seeds "1 2 3" --jobs 2
#   bash run_all.sh --list                 print the commands, one per line, and run nothing
#   bash run_all.sh -- --epochs 2 --fraction 0.1      settings for every run that does not set them itself
#
#   --only A,B       tables by their exact names, as in the first column below; `all` is every table. Without it, the
#                    slides' tables: runs that are only in beyond... have to be named
#   --arch A,B       networks: resnet18, densenet121, efficientnet_b0, custom
#   --from-scratch   no ImageNet weights for resnet18 and efficientnet_b0
#   --data, --root   as for train.py (default: cinic10, data)
#   --seeds "1 2 3"  seeds of every run
#   --out FOLDER     results, and a log of each run in FOLDER/logs (default: results)
#   --figures FOLDER (default: figures)
#   --jobs N         runs at a time, spread over the GPUs (default: one per GPU)
#
# A finished run is skipped, an interrupted one resumes: start the command again after anything.

# The study; aggregate.py lays out its tables from it, in this order. A line: the tables that it stands in, what runs
# (networks of train.py, `all` of those below, or another script), and its settings on top of the defaults, which
# reproduce the recipe (Adam, lr 0.001, batch 64, 10 epochs). A run of several lines is run once.
study='
all = resnet18 --pretrained, densenet121, efficientnet_b0 --pretrained, custom

overfitting                         custom    --aug none --epochs 30
initial,augmentation,weight-decay   all       --aug none
augmentation                        all       --aug flip
augmentation                        all       --aug rotation
augmentation                        all       --aug crop
augmentation                        all       --aug jitter
augmentation                        all       --aug autoaugment
augmentation                        all       --aug cutout
hybrid,learning-rate                all       --aug hybrid
learning-rate                       all       --aug hybrid --lr 0.002
learning-rate                       all       --aug hybrid --lr 0.0005
optimizer,dropout                   custom    --aug hybrid
optimizer                           custom    --aug hybrid --optimizer adagrad
optimizer                           custom    --aug hybrid --optimizer adamax
weight-decay                        all       --aug none --weight-decay 0.0001
weight-decay                        all       --aug none --weight-decay 0.0002
weight-decay                        all       --aug none --weight-decay 0.00005
dropout                             custom    --aug hybrid --dropout 0.1
dropout,moe,beyond-moe              custom    --aug hybrid --dropout 0.2
dropout                             custom    --aug hybrid --dropout 0.3
dropout                             custom    --aug hybrid --dropout 0.4
moe,beyond-moe                      custom    --aug hybrid --dropout 0.2 --classes vehicles
moe                                 custom    --aug hybrid --dropout 0.2 --classes cat,deer,dog,horse
moe                                 moe
fewshot,beyond-fewshot              fewshot   --fraction 0.001
fewshot,beyond-fewshot              fewshot   --fraction 0.002
fewshot,beyond-fewshot              fewshot   --fraction 0.005
fewshot,beyond-fewshot              fewshot   --fraction 0.01
fewshot,beyond-fewshot              fewshot   --fraction 0.02
fewshot,beyond-fewshot              fewshot   --fraction 0.05
fewshot,beyond-fewshot              fewshot   --fraction 0.1
regular,beyond-fewshot              custom    --aug flip+autoaugment --fraction 0.001 --batch-size 4
regular,beyond-fewshot              custom    --aug flip+autoaugment --fraction 0.002 --batch-size 4
regular,beyond-fewshot              custom    --aug flip+autoaugment --fraction 0.005 --batch-size 8
regular,beyond-fewshot              custom    --aug flip+autoaugment --fraction 0.01 --batch-size 16
regular,beyond-fewshot              custom    --aug flip+autoaugment --fraction 0.02 --batch-size 32
regular,beyond-fewshot              custom    --aug flip+autoaugment --fraction 0.05
regular,beyond-fewshot              custom    --aug flip+autoaugment --fraction 0.1
samples                             augment
beyond                              custom    --aug none
beyond                              custom    --schedule onecycle --aug none
beyond                              custom    --schedule onecycle --aug flip+translate
beyond                              custom    --schedule onecycle --aug flip+translate --label-smoothing 0.1 --tta flip
beyond                              custom    --schedule onecycle --aug flip+translate --label-smoothing 0.1 --tta flip --epochs 30
beyond                              resnet18  --aug none
beyond                              resnet18  --schedule onecycle --aug none
beyond                              resnet18  --schedule onecycle --stem small --aug none
beyond                              resnet18  --schedule onecycle --stem small --aug flip+translate
beyond                              resnet18,densenet121,efficientnet_b0  --schedule onecycle --stem small --aug flip+translate --label-smoothing 0.1 --tta flip
beyond                              resnet18,densenet121,efficientnet_b0  --schedule onecycle --stem small --aug flip+translate --label-smoothing 0.1 --tta flip --epochs 30
beyond                              resnet18  --schedule onecycle --stem small --aug flip+translate --label-smoothing 0.1 --tta flip --epochs 30 --optimizer sgd --momentum 0.9 --lr 0.05 --weight-decay 0.0005
beyond-fewshot                      custom    --aug flip+translate+autoaugment --schedule onecycle --batch-size 32 --steps-per-epoch 300 --fraction 0.001
beyond-fewshot                      custom    --aug flip+translate+autoaugment --schedule onecycle --batch-size 32 --steps-per-epoch 300 --fraction 0.002
beyond-fewshot                      custom    --aug flip+translate+autoaugment --schedule onecycle --batch-size 32 --steps-per-epoch 300 --fraction 0.005
beyond-fewshot                      custom    --aug flip+translate+autoaugment --schedule onecycle --batch-size 32 --steps-per-epoch 300 --fraction 0.01
beyond-fewshot                      custom    --aug flip+translate+autoaugment --schedule onecycle --batch-size 32 --steps-per-epoch 300 --fraction 0.02
beyond-fewshot                      custom    --aug flip+translate+autoaugment --schedule onecycle --batch-size 32 --steps-per-epoch 300 --fraction 0.05
beyond-fewshot                      custom    --aug flip+translate+autoaugment --schedule onecycle --batch-size 32 --steps-per-epoch 300 --fraction 0.1
beyond-moe                          custom    --aug hybrid --dropout 0.2 --classes animals
beyond-moe                          moe       --train-adapters --adapter-width 512 --animals all
'
# Choices that the slides leave open: learning rates, optimizers and dropouts were compared on hybrid (the report
# says so); so were the experts trained, with the dropout that won; weight decays were compared without augmentation.
# The lines of beyond... are ours, not the slides'; 10 epochs of 300 steps are as many steps as few-shot's 3,000.

# Written for macOS's bash 3.2 too: no associative arrays, no mapfile, no wait -n, and no set -u, with which it takes
# an empty array for an unset variable
set -eo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

here=$(dirname "${BASH_SOURCE[0]}")/
[ "$here" != ./ ] || here=
all=$(sed -n 's/^all = //p' <<<"$study")
only='slides' archs='' scratch='' data='' root=data out='' figures='' seeds='' jobs='' list='' smoke='' forking='' extra=()
while [ $# -gt 0 ]; do
  case $1 in
    --only | --arch | --data | --root | --out | --figures | --seeds | --jobs)
      [ $# -gt 1 ] || fail "$1 needs a value"
      [ "$2" ] || fail "$1 \"\": a value is missing"
      case $1 in
        --only) only=$2 ;; --arch) archs=$2 ;; --data) data=$2 ;; --root) root=$2 ;; --out) out=$2 ;;
        --figures) figures=$2 ;; --seeds) seeds=$2 ;; --jobs) jobs=$2 ;;
      esac
      shift ;;
    --from-scratch) scratch=yes ;;
    --smoke) smoke=yes ;;
    --list) list=yes ;;
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
    --seed) fail "unknown option --seed: here it is --seeds \"1 2 3\", for every run" ;;
    --) shift && extra=("$@") && break ;;
    *) fail "unknown option $1: see --help; settings for every run come after --" ;;
  esac
  shift
done
if [ "$smoke" ]; then
  [ "$only" != slides ] || only=all
  # the drawn sets are too small for the smallest fractions; beyond the slides, only what is quick
  study=$(grep -vE -- '--fraction 0\.00|--steps-per-epoch|^beyond .*(resnet18|--epochs 30)' <<<"$study")
  # few-shot learning needs two images of a class at 1 %: runs with a fraction of their own take the larger drawn set
  [ "$data" ] || study=${study// --fraction/ --data synthetic --fraction}
  data=${data:-synthetic-small} out=${out:-smoke/results} figures=${figures:-smoke/figures} seeds=${seeds:-1}
  jobs=${jobs:-2} scratch=yes
  [ "$(uname)" = Darwin ] || forking=yes # macOS's frameworks do not work in a forked process
  extra=(--epochs 1 --fraction 0.1 --episodes 5 --shot 1 --query 1 "${extra[@]}")
fi
data=${data:-cinic10} out=${out:-results} figures=${figures:-figures} seeds=${seeds:-1 2 3}

check() { # option, names given, names to choose from
  local name names=",$2,"
  [[ "$names" != *,,* ]] || fail "$1 $2: a name is missing"
  for name in ${2//,/ }; do [[ " $3 " == *" $name "* ]] || fail "$1 $name: choose from $3"; done
}
tables=$(awk 'NF > 1 && $2 != "=" { print $1 }' <<<"$study" | tr , '\n' | sort -u | tr '\n' ' ')
[ "$only" = slides ] || check --only "$only" "all ${tables% }"
networks=$({ echo "$all"; awk 'NF > 1 && $2 != "=" && $2 !~ /^(all|moe|fewshot|augment)$/ { print $2 }' <<<"$study"; } |
  sed 's/ --pretrained//g; s/ //g' | tr , '\n' | sort -u | tr '\n' ' ')
[ ! "$archs" ] || check --arch "$archs" "${networks% }"
[[ "$seeds" =~ ^[0-9]+(\ [0-9]+)*$ ]] || fail "--seeds \"$seeds\": must be numbers separated by spaces"
[[ "${jobs:-1}" =~ ^[1-9][0-9]*$ ]] || fail "--jobs $jobs: must be at least 1"

# Commands

# The settings after --, as a line for each script, its name and those that it has; an error if none has one
sort_extra='
import shlex, sys
import fewshot, moe, train

options = []  # each with its values
for word in sys.argv[1:]:
    if word.startswith("-") or not options:
        options.append([])
    options[-1].append(word)
unknown = list(options)
try:
    for script in (train, fewshot, moe):
        parser = script.make_parser()
        known = [o for o in options if o[0] not in ("-h", "--help") and not parser.parse_known_args(o)[1]]
        unknown = [option for option in unknown if option not in known]
        print(script.__name__, shlex.join(word for option in known for word in option))
    for option in options:
        if option[0].split("=")[0] in ("--seed", "--data", "--root", "--out"):
            raise ValueError(option[0] + ": belongs before -- (seeds as --seeds)")
    if unknown:
        raise ValueError(" ".join(unknown[0]) + ": neither train.py nor fewshot.py nor moe.py has this option")
except ValueError as error:
    sys.exit(f"error: {error}")
'
if [ ${#extra[@]} -gt 0 ]; then
  sorted=$(PYTHONPATH=${here:-.}${PYTHONPATH:+:$PYTHONPATH} python -c "$sort_extra" "${extra[@]}") || exit 2
fi

first='' last=" --seed $seeds" # of a command; a line's own settings come after the first and win
[ "$data" = cinic10 ] || printf -v first ' --data %q' "$data"
[ "$out" = results ] || printf -v last ' --out %q%s' "$out" "$last"
[ "$root" = data ] || printf -v last ' --root %q%s' "$root" "$last"

commands=() names=() listed=$'\n'
add() { # script, settings: a command, and a name for its log
  local settings command
  settings="$(sed -n "s/^$1 //p" <<<"$sorted") $2"
  settings=${settings# } settings=${settings% }
  command="python $here$1.py$first${settings:+ $settings}$last"
  [ "$1" != augment ] || printf -v command 'python %saugment.py%s --root %q --out %q' "$here" "$first" "$root" "$figures/augmentation.png"
  [[ "$listed" != *$'\n'"$command"$'\n'* ]] || return 0
  listed+=$command$'\n' commands+=("$command")
  names+=("$(tr -cs 'A-Za-z0-9.+\n' '-' <<<"$1 $2" | sed 's/-*$//')")
}

while read -r tables what settings; do
  [ "$what" ] && [ "$what" != = ] || continue
  case $only in
    all) ;;
    slides) grep -qv '^beyond' <<<"${tables//,/$'\n'}" || continue ;;
    *) grep -qxF "${only//,/$'\n'}" <<<"${tables//,/$'\n'}" || continue ;;
  esac
  case $what in
    fewshot | moe | augment) add "$what" "$settings" && continue ;;
    all) what=$all ;;
  esac
  while read -r arch start; do
    [[ ! "$archs" || ",$archs," == *",$arch,"* ]] || continue
    [ ! "$scratch" ] || start=''
    add train "--arch $arch ${start:+$start }$settings"
  done <<<"${what//,/$'\n'}"
done <<<"$study"
[ ${#commands[@]} -gt 0 ] || fail "nothing to run: no line of the study is in --only $only and --arch ${archs:-all}"

if [ "$list" ]; then
  printf '%s\n' "${commands[@]}"
  exit
fi

# Running: as many workers as --jobs, each of which takes one run after the other until none is left

gpus=()
if [ "${CUDA_VISIBLE_DEVICES+set}" ]; then # an empty one hides all GPUs
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null; then
  while read -r gpu; do gpus+=("$gpu"); done < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)
fi
jobs=${jobs:-$((${#gpus[@]} > 0 ? ${#gpus[@]} : 1))}
if [ ${#gpus[@]} -eq 0 ] && [ "$jobs" -gt 1 ]; then
  cores=$(getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}
fi

mkdir -p "$out/logs" "$figures"
state=$(mktemp -d) # what the workers share: a folder for each run that one has taken, and lists of runs by number
touch "$state/ended" "$state/trained" "$state/failed"
count() { grep -c '' "$state/$1" || true; }

stop() {
  local pids
  pids=$(jobs -p)
  # shellcheck disable=SC2086
  kill $pids 2>/dev/null || true
  wait
  printf '\n%d of %d runs have ended; start again to resume\n' "$(count ended)" ${#commands[@]} >&2
  exit "$1"
}
trap 'rm -rf "$state"' EXIT
trap 'stop 130' INT
trap 'stop 143' TERM

show() { # what is done, what runs, how long it will take; one line, drawn over on a terminal
  local ended trained failed line left name
  ended=$(count ended) trained=$(count trained) failed=$(count failed) line="$ended/${#commands[@]} done"
  [ "$failed" = 0 ] || line+=", $failed failed"
  if [ "$trained" -gt 0 ] && [ "$ended" -lt ${#commands[@]} ]; then
    left=$(((SECONDS - began) * (${#commands[@]} - ended) / trained))
    line+=", about $((left / 3600)) h $((left % 3600 / 60)) min left"
  fi
  while read -r name; do line+=" | $name"; done < <(cat "$state"/running.* 2>/dev/null)
  if [ -t 1 ]; then printf '\r\033[K%.*s' "${COLUMNS:-120}" "$line"; else echo "$line"; fi
}

# Most of a tiny run is the import of torch. This process imports it once, forks for every line on its standard input
# (a log and a command), and prints the exit status of each
fork='
import os, runpy, shlex, signal, sys
import torch._dynamo, torchvision

def stop(*_):
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    sys.exit(143)

for line in sys.stdin:
    log, _, script, *arguments = shlex.split(line)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        for number, name in ((0, os.devnull), (1, log), (2, log)):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(os.path.abspath(script))
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    signal.signal(signal.SIGTERM, stop)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status if status >= 0 else 128 - status, flush=True)
'

run() { # log, command; sets status
  status=0
  if [ "$forking" ]; then
    printf '%q %s\n' "$1" "$2" >&3
    read -r status <&4 || status=1
  else
    bash -c "exec $2" >"$1" 2>&1 </dev/null &
    wait $! || status=$?
  fi
}

work() { # slot, numbers of runs
  local slot=$1 index log status
  trap 'kill $(jobs -p) 2>/dev/null || true; wait; exit' TERM
  [ ${#gpus[@]} -eq 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[slot % ${#gpus[@]}]}
  if [ "$forking" ] && [ $# -gt 1 ]; then
    mkfifo "$state/lines.$slot" "$state/statuses.$slot"
    python -c "$fork" <"$state/lines.$slot" >"$state/statuses.$slot" &
    exec 3>"$state/lines.$slot" 4<"$state/statuses.$slot"
    rm "$state/lines.$slot" "$state/statuses.$slot"
  fi
  for index in "${@:2}"; do
    kill -0 $$ 2>/dev/null || exit # the script is gone
    mkdir "$state/$index" 2>/dev/null || continue # another worker took it
    log=$out/logs/${names[index]}.log
    rm -f "$log"
    echo "${names[index]}" >"$state/running.$slot"
    show
    run "$log" "${commands[index]}"
    [ "$status" -le 128 ] || echo "killed by signal $((status - 128))" >>"$log"
    [ "$status" -eq 0 ] || echo "$index" >>"$state/failed"
    ! grep -q 'train loss' "$log" || echo "$index" >>"$state/trained"
    echo "$index" >>"$state/ended"
  done
  rm -f "$state/running.$slot"
  exec 3>&- # the forking process ends with its input
  wait
}

work_on() { # numbers of runs
  local slot
  for ((slot = 0; slot < jobs; slot++)); do work "$slot" "$@" & done
  wait
}

plots=(--figures "$figures")
python -c 'import matplotlib' 2>/dev/null || plots=()
[[ "$data" = synthetic* ]] || python "${here}data.py" --data "$data" --root "$root" # once, before all want it
began=$SECONDS first=() last=()
for index in "${!commands[@]}"; do
  case ${commands[index]} in
    *augment.py*) if [ ${#plots[@]} -gt 0 ]; then first+=("$index"); else echo "$index" >>"$state/ended"; fi ;;
    *moe.py*) last+=("$index") ;; # the mixture takes its experts from the results of other runs
    *) first+=("$index") ;;
  esac
done
work_on "${first[@]}"
work_on "${last[@]}"
show
printf '\n\n'

if compgen -G "$out/*/seed*.json" >/dev/null; then
  python "${here}aggregate.py" "$out" "${plots[@]}" || failed_tables=yes
  [ ${#plots[@]} -gt 0 ] || echo "no figures: pip install matplotlib, and start again"
fi
if [ -s "$state/failed" ]; then
  printf '\n%d of %d runs failed:\n' "$(count failed)" ${#commands[@]}
  sort -n "$state/failed" | while read -r index; do
    log=$out/logs/${names[index]}.log
    printf '  %s\n    %s: %s\n' "${commands[index]}" "$log" "$(tail -n 1 "$log")"
  done
fi
[ ! -s "$state/failed" ] && [ ! "$failed_tables" ]
