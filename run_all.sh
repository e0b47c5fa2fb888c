#!/usr/bin/env bash
# The study: every run behind every table and figure and, below, how they are started.
#
#   bash run_all.sh                        the study: CINIC-10, seeds 1 2 3
#   bash run_all.sh --smoke                every table and figure, tiny, on generated images: minutes
#   bash run_all.sh --only initial,dropout --data path/to/folder --seeds 1 2 --jobs 2
#   bash run_all.sh --list                 print the commands, one per line, and run nothing
#   bash run_all.sh -- --epochs 2          settings for every train.py and moe.py without its own
#
# --only: tables, or all (default: all but beyond...). --arch: networks; custom includes few-shot learning and
# mixtures. --data, --root: as for train.py. --jobs: runs at a time (default: one per GPU). --out: folder for
# results, logs, tables.md and figures. --from-scratch: no ImageNet weights. Finished runs are skipped.

study() { # A run stands under the tables that show it. Settings that it leaves out are the recipe's
  networks="resnet18 densenet121 efficientnet_b0 custom"
  pretrained="resnet18 efficientnet_b0" # start from ImageNet weights
  for arch in $networks; do
    table initial augmentation weight-decay; train --arch "$arch" --aug none
    table augmentation
    for aug in flip rotation crop jitter autoaugment cutout; do train --arch "$arch" --aug "$aug"; done
    table hybrid learning-rate; train --arch "$arch" --aug hybrid
    table learning-rate # on hybrid, as in the study; so are optimizers and dropout rates
    for lr in 0.002 0.0005; do train --arch "$arch" --aug hybrid --lr "$lr"; done
    table weight-decay # the study does not say on which augmentation: on none
    for decay in 0.0001 0.0002 0.00005; do train --arch "$arch" --aug none --weight-decay "$decay"; done
  done

  table overfitting; train --arch custom --aug none --epochs 30
  table optimizer dropout; train --arch custom --aug hybrid
  table optimizer
  for optimizer in adagrad adamax; do train --arch custom --aug hybrid --optimizer "$optimizer"; done
  table dropout; for rate in 0.1 0.2 0.3 0.4; do train --arch custom --aug hybrid --dropout "$rate"; done

  for pair in 0.001:4 0.002:4 0.005:8 0.01:16 0.02:32 0.05:64 0.1:64; do # fraction:batch size
    fraction=${pair%:*}
    table fewshot beyond-fewshot; fewshot --fraction "$fraction"
    table regular beyond-fewshot # training on the same images
    train --arch custom --aug flip+autoaugment --fraction "$fraction" --batch-size "${pair#*:}"
    table beyond-fewshot # 10 epochs of 300 steps: as many steps as few-shot learning has episodes
    train --arch custom --aug flip+translate+autoaugment --fraction "$fraction" --batch-size 32 \
      --schedule onecycle --steps-per-epoch 300
  done

  pretrained="" # beyond the study: settings of our own, from scratch
  best=(--schedule onecycle --aug flip+translate --label-smoothing 0.1)
  table beyond
  train --arch custom --aug none
  for aug in none flip+translate; do train --arch custom --schedule onecycle --aug "$aug"; done
  train --arch custom "${best[@]}"
  train --arch custom "${best[@]}" --epochs 30
  train --arch resnet18 --aug none
  train --arch resnet18 --schedule onecycle --aug none
  for aug in none flip+translate; do train --arch resnet18 --stem small --schedule onecycle --aug "$aug"; done
  for arch in resnet18 densenet121 efficientnet_b0; do
    train --arch "$arch" --stem small "${best[@]}"
    train --arch "$arch" --stem small "${best[@]}" --epochs 30
  done
  sgd=(--optimizer sgd --momentum 0.9 --lr 0.05 --weight-decay 0.0005)
  train --arch resnet18 --stem small "${best[@]}" --epochs 30 "${sgd[@]}"

  table moe beyond-moe # last: it waits for its experts. The study leaves their recipe open: here its best
  train --arch custom --aug hybrid --dropout 0.2
  train --arch custom --aug hybrid --dropout 0.2 --classes vehicles
  table moe; train --arch custom --aug hybrid --dropout 0.2 --classes cat,deer,dog,horse
  moe
  table beyond-moe; train --arch custom --aug hybrid --dropout 0.2 --classes animals
  moe --train-adapters --adapter-width 512 --experts vehicles animals
}

# How the runs are started, in what bash 3.2 (macOS) understands
has() { case " $1 " in *" $2 "*) ;; *) return 1 ;; esac; } # LIST WORD: whether the word is in the list
table() { # NAMES: of the tables that show the runs after it
  chosen=""
  for name; do
    has "$tables" "$name" || tables+=" $name"
    if has "$only" "$name" || has "$only" all || [[ ! $only && $name != beyond* ]]; then chosen=yes; fi
  done
}
moe() { add custom moe.py "$@"; }
fewshot() { add custom fewshot.py "$@"; }
train() { add "$2" train.py "$@"; } # --arch NETWORK SETTINGS
add() { # NETWORK SCRIPT SETTINGS: one more command, if it was asked for and is not there yet
  local network=$1 script=$2 own=("${@:3}") common=("${settings[@]}") label line sum
  if [ ! "$chosen" ] || ! { has "$arches" "$network" || has "$arches" all; }; then return; fi
  case $smoke$* in # --smoke leaves out what is slow; of its two networks, custom shows every value
    yes*"fraction 0.0"[012]* | yes*resnet18*smooth* | yes*smooth*30 | yes*"resnet18 --aug "[racj]*) return ;;
    yes*"resnet18 "*"--lr 0.0005" | yes*"resnet18 "*"--weight-decay 0.000"[02]*) return ;;
  esac
  if [ "$smoke" ] && has "${own[*]}" --steps-per-epoch; then own+=(--batch-size 2); fi # 300 steps in seconds
  if [ ! "$from_scratch" ] && has "$pretrained" "$network"; then own+=(--pretrained); fi
  if [ "$script" = fewshot.py ]; then common=(${smoke:+--episodes 5}); fi # its recipe is another
  label="$script ${own[*]}" label=${label% }
  printf -v line '%q ' "$python" "$folder$script" ${data:+--data "$data"} ${root:+--root "$root"} \
    ${out:+--out "$out"} --seed "${numbers[@]}" "${common[@]}" "${own[@]}" # its own settings last: they win
  line=${line% } line=${line//\\,/,} # a comma needs no backslash
  case $'\n'$lines in *$'\n'"$line"$'\n'*) return ;; esac # it stands in an earlier table too
  name=${label/.py/} name=${name// --/-} sum=$(cksum <<<"$line") # other data or settings, another log
  lines+=$line$'\n' commands+=("$line") labels+=("$label") logs+=("$results/logs/${name// /-}-${sum%% *}.log")
}
fail() { echo "run_all.sh: error: $2" >&2 && exit "$1"; }
choose() { # WHAT VALUE CHOICES: fails, with the nearest of them, unless the value is one
  local near='import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2].split(), 1))'
  if has "$3" "$2"; then return; fi
  near=$("$python" -c "$near" "$2" "$3" 2>/dev/null)
  fail 2 "$1 $2: ${near:+did you mean $near? }choose from $3"
}
call() { "$@" & wait $! 2>/dev/null; } # a shell that waits handles a signal at once
worker() { # NUMBER: runs the commands that no other worker has claimed
  trap 'trap "" INT TERM; kill $! 2>/dev/null; wait 2>/dev/null; exit' INT TERM
  [ ${#gpus[@]} = 0 ] || export CUDA_VISIBLE_DEVICES="${gpus[$1 % ${#gpus[@]}]}"
  for ((i = 0; i < ${#commands[@]}; i++)); do
    SECONDS=0; mkdir "$claims/$i" 2>/dev/null || continue
    if call eval "exec ${commands[i]}" >>"${logs[i]}" 2>&1; then # its last line: seed or mean, accuracy, ...
      outcome="accuracy $(awk -F '  +' 'END { print $2 }' "${logs[i]}")"
    else
      outcome="failed (exit status $?): $(tail -n 1 "${logs[i]}")"
      printf '\n%s\n  %s: %s\n' "${commands[i]}" "${logs[i]}" "$outcome" >>"$claims/failed"
    fi
    echo "$((i + 1))/${#commands[@]}  $((SECONDS / 60)) min $((SECONDS % 60)) s  ${labels[i]}: $outcome"
  done
}
python=python script=$0 tables="" lines="" commands=() labels=() logs=() figures=() settings=() given=""
only="" arch="" data="" root="" out="" jobs="" seeds="" torch="" from_scratch="" smoke="" list="" help=""
options="--only --arch --data --root --seeds --seed --jobs --out --from-scratch --smoke --list --help"
command -v python >/dev/null || python=python3
[ ! -L "$0" ] || script=$("$python" -c 'import os, sys; print(os.path.realpath(sys.argv[1]))' "$0")
folder=$(dirname "$script")/ folder=${folder#./}
while [ $# -gt 0 ]; do
  option=$1 value=""
  case $1 in
    --) settings=("${@:2}") given=${*:2} && break ;;
    --from-scratch | --smoke | --list | --help) value=yes ;;
    *) while [[ $# -gt 1 && $2 != --* ]]; do value+=${value:+ }$2 && shift; done ;;
  esac
  choose "unknown option" "$option" "$options (settings of the runs come after --)"
  [ "$value" ] || fail 2 "$option: a value is missing"
  option=${option/%seed/seeds} option=${option#--}
  printf -v "${option/-/_}" %s "$value" && shift # --from-scratch sets $from_scratch, and so on
done
case " $given " in *" --seed"* | *" --data"* | *" --root"* | *" --out"* | *" --help"* | *" -h "* | " "[!-\ ]*)
  fail 2 "$given: --seed, --data, --root, --out and --help go before --, settings after it" ;;
esac
if [ "$smoke" ]; then
  from_scratch=yes only=${only:-all} arch=${arch:-resnet18,custom} data=${data:-synthetic-small}
  out=${out:-smoke} jobs=${jobs:-2} seeds=${seeds:-1} settings=(--epochs 1 --fraction 0.15 "${settings[@]}")
fi
[[ ${seeds:=1 2 3} =~ ^[0-9]+(\ [0-9]+)*$ ]] || fail 2 "--seeds $seeds: write whole numbers, as in 1 2 3"
[[ ${jobs:-1} =~ ^[1-9][0-9]*$ ]] || fail 2 "--jobs $jobs: write a whole number, at least 1"
read -r -a numbers <<<"$seeds"
only=${only//,/ } arches=${arch:-all} arches=${arches//,/ } results=${out:-results}
study
[ ! "$help" ] || { sed -n '2,/^$/s/^# \{0,1\}//p' "$script" && echo "Tables:$tables" && exit; }
for name in $only; do choose --only "$name" "all$tables"; done
for name in $arches; do choose --arch "$name" "all $networks"; done
[ "$lines" ] || fail 2 "nothing to run: no run has --only ${only// /,} and --arch ${arches// /,}"
"$python" -c 'import importlib.util as u; exit(not u.find_spec("torch"))' 2>/dev/null && torch=yes
[ "$torch$list" ] || fail 1 "$python cannot import torch: activate its environment, or install its packages"
if [ "$torch" ] && [ "$given" ]; then # as the scripts read them; Python has no $''
  printf %s "$lines" | grep -v "[$]'" | (cd "${folder:-.}" && "$python" -c 'import pathlib, runs, shlex, sys
for _, sys.argv[0], *arguments in map(shlex.split, sys.stdin):
    script = __import__(pathlib.Path(sys.argv[0]).stem)
    runs.command_line(lambda: script.parse_arguments(arguments))') || exit 2
fi
echo "${#commands[@]} commands, for seeds $seeds each; result files in $results so far: $(find -L "$results" -name 'seed*.json' 2>/dev/null | wc -l)" >&2
[ ! "$list" ] || { printf %s "$lines" && exit; }
"$python" -c 'import matplotlib' 2>/dev/null && figures=(--figures "$results/figures")
visible=${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')}
read -r -d '' -a gpus <<<"${visible//,/ }"
jobs=${jobs:-$((${#gpus[@]} > 1 ? ${#gpus[@]} : 1))} cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
[ "$jobs" = 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < jobs ? 1 : cores / jobs))}"
mkdir -p "$results/logs" && claims=$(mktemp -d) || exit 1
trap 'trap "" INT TERM; jobs -p | xargs kill 2>/dev/null; wait 2>/dev/null; rm -r "$claims"' EXIT
trap 'echo "stopped by SIGINT; the same command continues" >&2; exit 130' INT
trap 'echo "stopped by SIGTERM; the same command continues" >&2; exit 143' TERM
[[ $data == synthetic* ]] || # else once for all
  call "$python" "${folder}data.py" ${data:+--data "$data"} ${root:+--root "$root"} || exit
for ((k = 0; k < jobs; k++)); do worker "$k" & done; wait
call "$python" "${folder}aggregate.py" "$results" "${figures[@]}" >"$claims/tables.md" &&
  mv "$claims/tables.md" "$results/" && cat "$results/tables.md" || echo "no tables" >>"$claims/failed"
[ ! -e "$claims/failed" ] || { echo $'\nFailed:' && cat "$claims/failed" && exit 1; }
