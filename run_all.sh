#!/usr/bin/env bash
# Every run behind the tables and figures of the slides, and then the tables.
#
#   bash run_all.sh                        everything: CINIC-10, seeds 1 2 3
#   bash run_all.sh --smoke                everything, tiny, on images that the program draws: minutes
#   bash run_all.sh --only initial,moe --data path/to/folder --seeds "1 2 3" --jobs 2
#   bash run_all.sh --list                 print the commands, one a line, and run nothing
#   bash run_all.sh -- --epochs 2 --fraction 0.1      with settings of your own, where a run has none
#
#   --only A,B       these tables: a name in the first column below
#   --arch A,B       these architectures, of custom, densenet121, resnet18, efficientnet_b0
#   --from-scratch   no ImageNet weights for resnet18 and efficientnet_b0
#   --data, --root   as for train.py (default: cinic10, data)
#   --seeds "1 2 3"  of every run
#   --out FOLDER     results, and a log of each run in FOLDER/logs (default: results)
#   --figures FOLDER (default: figures)
#   --jobs N         runs at a time, spread over the GPUs (default: one a GPU)
#
# A run whose result is there is skipped, one that was stopped goes on: start it again after anything.

# The study. A run has the recipe (Adam, lr 0.001, batch 64, 10 epochs) and the settings of its line; `all` is each
# of the four architectures, `others` each but custom, with the slides' weights to start from; a name is that one, from
# scratch, `scratch` each but custom. Settings after -- come before those of a line, which win.
study='
tables                           what     settings
initial,beyond                   custom   --aug none
initial                          others   --aug none
overfitting                      custom   --aug none --epochs 30
augmentation                     all      --aug flip
augmentation                     all      --aug rotation
augmentation                     all      --aug crop
augmentation                     all      --aug jitter
augmentation                     all      --aug autoaugment
augmentation                     all      --aug cutout
hybrid,learning-rate             others   --aug hybrid
hybrid,learning-rate,optimizer   custom   --aug hybrid
learning-rate                    all      --aug hybrid --lr 0.002
learning-rate                    all      --aug hybrid --lr 0.0005
optimizer                        custom   --aug hybrid --optimizer adamax
optimizer                        custom   --aug hybrid --optimizer adagrad
weight-decay                     all      --aug none --weight-decay 0.0001
weight-decay                     all      --aug none --weight-decay 0.0002
weight-decay                     all      --aug none --weight-decay 0.00005
dropout                          custom   --aug hybrid --dropout 0.1
dropout,moe,beyond-moe           custom   --aug hybrid --dropout 0.2
dropout                          custom   --aug hybrid --dropout 0.3
dropout                          custom   --aug hybrid --dropout 0.4
moe,beyond-moe                   custom   --aug hybrid --dropout 0.2 --classes vehicles
moe                              custom   --aug hybrid --dropout 0.2 --classes cat,deer,dog,horse
fewshot                          fewshot  --fraction 0.001
fewshot                          fewshot  --fraction 0.002
fewshot                          fewshot  --fraction 0.005
fewshot                          fewshot  --fraction 0.01
fewshot                          fewshot  --fraction 0.02
fewshot                          fewshot  --fraction 0.05
fewshot                          fewshot  --fraction 0.1
regular                          custom   --aug flip+autoaugment --fraction 0.001 --batch-size 4
regular                          custom   --aug flip+autoaugment --fraction 0.002 --batch-size 4
regular                          custom   --aug flip+autoaugment --fraction 0.005 --batch-size 8
regular                          custom   --aug flip+autoaugment --fraction 0.01 --batch-size 16
regular                          custom   --aug flip+autoaugment --fraction 0.02 --batch-size 32
regular                          custom   --aug flip+autoaugment --fraction 0.05
regular                          custom   --aug flip+autoaugment --fraction 0.1
samples                          augment
moe                              moe
beyond                           custom   --schedule onecycle --aug none
beyond                           custom   --schedule onecycle --aug flip+translate
beyond                           custom   --schedule onecycle --aug flip+translate --label-smoothing 0.1 --tta flip
beyond                           custom   --schedule onecycle --aug flip+translate --label-smoothing 0.1 --tta flip --epochs 30
beyond                           resnet18 --aug none
beyond                           resnet18 --schedule onecycle --aug none
beyond                           resnet18 --schedule onecycle --stem small --aug none
beyond                           resnet18 --schedule onecycle --stem small --aug flip+translate
beyond                           scratch  --schedule onecycle --stem small --aug flip+translate --label-smoothing 0.1 --tta flip
beyond                           scratch  --schedule onecycle --stem small --aug flip+translate --label-smoothing 0.1 --tta flip --epochs 30
beyond                           resnet18 --schedule onecycle --stem small --aug flip+translate --label-smoothing 0.1 --tta flip --epochs 30 --optimizer sgd --momentum 0.9 --lr 0.05 --weight-decay 0.0005
beyond-fewshot                   fewshot  --method labels --fraction 0.001
beyond-fewshot                   fewshot  --method labels --fraction 0.002
beyond-fewshot                   fewshot  --method labels --fraction 0.005
beyond-fewshot                   fewshot  --method labels --fraction 0.01
beyond-fewshot                   fewshot  --method labels --fraction 0.02
beyond-fewshot                   fewshot  --method labels --fraction 0.05
beyond-fewshot                   fewshot  --method labels --fraction 0.1
beyond-moe                       custom   --aug hybrid --dropout 0.2 --classes animals
beyond-moe                       moe      --train-adapters --adapter-width 512 --animals all
'
# Choices that the slides leave open: learning rates, optimizers and dropouts were compared on hybrid (the report
# says so); so were the experts trained, with the dropout that won; weight decays were compared without augmentation.
# The lines of beyond... are ours, not the slides'.

set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

here=$(dirname "${BASH_SOURCE[0]}")/
[ "$here" = ./ ] && here=
all=custom,densenet121,resnet18,efficientnet_b0
only='' archs=$all scratch='' data='' root=data out='' figures='' seeds='' jobs='' list='' smoke='' extra=()
while [ $# -gt 0 ]; do
  case $1 in
    --only | --arch | --data | --root | --out | --figures | --seeds | --jobs)
      [ $# -gt 1 ] || fail "$1 needs a value"
      case $1 in
        --only) only=$2 ;; --arch) archs=$2 ;; --data) data=$2 ;; --root) root=$2 ;; --out) out=$2 ;;
        --figures) figures=$2 ;; --seeds) seeds=$2 ;; --jobs) jobs=$2 ;;
      esac
      shift ;;
    --from-scratch) scratch=yes ;;
    --smoke) smoke=yes ;;
    --list) list=yes ;;
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
    --) shift && extra=("$@") && break ;;
    *) fail "unknown option $1: see --help; settings for every training come after --" ;;
  esac
  shift
done
if [ "$smoke" ]; then # the synthetic set has too few images for the smallest fractions; beyond the slides, only what is quick
  study=$(grep -vE 'fraction 0.00|^beyond +(resnet18|scratch)|^beyond .*--epochs 30' <<<"$study")
  data=${data:-synthetic} out=${out:-smoke/results} figures=${figures:-smoke/figures} seeds=${seeds:-1} jobs=${jobs:-2}
  scratch=yes
  extra=(--epochs 1 --fraction 0.02 --episodes 5 --shot 1 --query 1 "${extra[@]}")
fi
data=${data:-cinic10} out=${out:-results} figures=${figures:-figures} seeds=${seeds:-1 2 3}

check() { # option, its names, what there is
  local name names=",$2,"
  [[ "$names" != *,,* ]] || fail "$1 $2: a name is missing"
  for name in ${2//,/ }; do [[ " $3 " == *" $name "* ]] || fail "$1 $name: choose from $3"; done
}
tables=$(sed -n 's/^\([a-z,-]\+\) .*/\1/p' <<<"${study#*settings}" | tr , '\n' | sort -u | paste -sd' ')
[ -z "$only" ] || check --only "$only" "$tables"
check --arch "$archs" "${all//,/ }"
[[ "$seeds" =~ ^[0-9]+(\ [0-9]+)*$ ]] || fail "--seeds \"$seeds\": numbers between spaces"
[[ "${jobs:-1}" =~ ^[1-9][0-9]*$ ]] || fail "--jobs $jobs: a number from 1 on"

# Commands

extra_for() { # the settings after --, without those that the script does not have
  local skip i
  case $1 in
    train) skip=' --way --shot --query --episodes --method --animals --train-adapters --adapter-width ' ;;
    moe) skip=' --way --shot --query --episodes --method --dropout --stem --tta ' ;;
    *) skip=' --epochs --batch-size --dropout --label-smoothing --stem --tta --animals --train-adapters --adapter-width ' ;;
  esac
  for ((i = 0; i < ${#extra[@]}; i++)); do
    if [[ "$skip" != *" ${extra[i]%%=*} "* ]]; then
      printf '%q ' "${extra[i]}"
    elif [[ "${extra[i]}" != *=* && "${extra[i]}" != --train-adapters ]]; then
      ((++i)) # its value
    fi
  done
}

commands=() names=()
declare -A listed=()
add() { # script, settings: a command, and its name for a log
  local script=$1 settings=$2 common=''
  [ "$data" = cinic10 ] || printf -v common ' --data %q' "$data"
  [ "$root" = data ] || printf -v common '%s --root %q' "$common" "$root"
  if [ "$script" = augment ]; then
    printf -v settings -- '--out %q' "$figures/augmentation.png"
  else
    [ "$out" = results ] || printf -v common '%s --out %q' "$common" "$out"
    settings="$(extra_for "$script")$settings"
    common+=" --seed $seeds"
  fi
  settings="python $here$script.py${settings:+ ${settings% }}$common"
  [ ! "${listed[$settings]:-}" ] || return 0 # --from-scratch makes two lines one
  commands+=("$settings") listed[$settings]=yes
  names+=("$(tr -cs 'A-Za-z0-9.+\n' '-' <<<"$script ${2:-}" | sed 's/-*$//')")
}

while read -r tables what settings; do
  [ "$tables" ] && [ "$tables" != tables ] || continue
  [ -z "$only" ] || [[ "$(printf ',%s,' "${tables//,/,,}")" =~ ,(${only//,/|}), ]] || continue
  case $what in
    all) networks=$all ;;
    others | scratch) networks=${all#custom,} ;;
    fewshot | moe | augment) add "$what" "$settings" && continue ;;
    *) networks=$what ;;
  esac
  for arch in ${networks//,/ }; do
    [[ ",$archs," == *",$arch,"* ]] || continue
    start=
    case $what-$arch in all-resnet18 | others-resnet18 | all-efficientnet_b0 | others-efficientnet_b0)
      [ "$scratch" ] || start=' --pretrained' ;;
    esac
    add train "--arch $arch$start $settings"
  done
done <<<"$study"
[ ${#commands[@]} -gt 0 ] || fail "nothing to run: no line of the study is in --only $only and --arch $archs"

if [ "$list" ]; then
  printf '%s\n' "${commands[@]}"
  exit
fi

# Running

gpus=()
if [ "${CUDA_VISIBLE_DEVICES:-}" ]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null; then
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)
fi
jobs=${jobs:-$((${#gpus[@]} > 0 ? ${#gpus[@]} : 1))}
if [ ${#gpus[@]} -eq 0 ] && [ "$jobs" -gt 1 ]; then
  cores=$(nproc)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}
fi

pids=() running=() failed=() finished=0 trained=0 began=$SECONDS

stop() {
  kill "${pids[@]}" 2>/dev/null || true
  wait
  printf '\n%d of %d runs have ended; start again to go on\n' "$finished" "${#commands[@]}" >&2
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM

show() { # what is done, what runs, how long it will take; one line, drawn over on a terminal
  local line="$finished/${#commands[@]} done" slot left
  [ ${#failed[@]} -eq 0 ] || line+=", ${#failed[@]} failed"
  if [ "$trained" -gt 0 ] && [ "$finished" -lt ${#commands[@]} ]; then
    left=$(((SECONDS - began) * (${#commands[@]} - finished) / trained))
    line+=", about $((left / 3600)) h $((left % 3600 / 60)) min left"
  fi
  for slot in "${!running[@]}"; do line+="${slot:+ | }${names[${running[slot]}]}"; done
  if [ -t 1 ]; then printf '\r\033[K%.*s' "${COLUMNS:-120}" "$line"; else echo "$line"; fi
}

reap() { # wait until a run ends
  local slot status ended=''
  while [ ! "$ended" ]; do
    for slot in "${!pids[@]}"; do
      kill -0 "${pids[slot]}" 2>/dev/null && continue
      ended=yes status=0
      wait "${pids[slot]}" || status=$?
      ((++finished))
      [ $status -eq 0 ] || failed+=("${running[slot]}")
      [ $status -le 128 ] || echo "killed by signal $((status - 128))" >>"$out/logs/${names[${running[slot]}]}.log"
      grep -q 'train loss' "$out/logs/${names[${running[slot]}]}.log" && ((++trained))
      unset "pids[slot]" "running[slot]"
    done
    [ "$ended" ] || sleep 0.2
  done
}

start() {
  local slot=0
  while [ "${pids[slot]:-}" ]; do ((++slot)); done
  [ ${#gpus[@]} -eq 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[slot % ${#gpus[@]}]}
  bash -c "exec ${commands[$1]}" >"$out/logs/${names[$1]}.log" 2>&1 </dev/null &
  pids[slot]=$! running[slot]=$1
  show
}

mkdir -p "$out/logs" "$figures"
plots=(--figures "$figures")
python -c 'import matplotlib' 2>/dev/null || plots=()
[ "$data" = synthetic ] || python "${here}data.py" --data "$data" --root "$root" # once, before all want it
for index in "${!commands[@]}"; do
  if [[ "${commands[index]}" == *augment.py* ]] && [ ${#plots[@]} -eq 0 ]; then
    ((++finished))
    continue
  fi
  # the mixture takes its experts from the results of other runs
  if [[ "${commands[index]}" == *moe.py* ]]; then while [ ${#pids[@]} -gt 0 ]; do reap; done; fi
  while [ ${#pids[@]} -ge "$jobs" ]; do reap; done
  start "$index"
done
while [ ${#pids[@]} -gt 0 ]; do reap; done
show
printf '\n\n'

if compgen -G "$out/*/seed*.json" >/dev/null; then
  python "${here}aggregate.py" "$out" "${plots[@]}" || failed_tables=yes
  [ ${#plots[@]} -gt 0 ] || echo "no figures: pip install matplotlib, and start again"
fi
if [ ${#failed[@]} -gt 0 ]; then
  printf '\n%d of %d runs failed:\n' ${#failed[@]} ${#commands[@]}
  for index in "${failed[@]}"; do
    log=$out/logs/${names[index]}.log
    printf '  %s\n    %s: %s\n' "${commands[index]}" "$log" "$(tail -n 1 "$log")"
  done
fi
[ ${#failed[@]} -eq 0 ] && [ ! "${failed_tables:-}" ]
