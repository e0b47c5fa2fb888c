"""The study: runs everything behind the slides' tables and figures, then prints and draws them.

    bash run_all.sh                        the slides' study: CINIC-10, seeds 1 2 3
    bash run_all.sh --smoke                every table, tiny, on generated images: minutes
    bash run_all.sh --only initial,moe --data path/to/folder --seeds "1 2 3" --jobs 2
    bash run_all.sh --list                 print the commands, one per line, and run nothing
    bash run_all.sh -- --epochs 2 --fraction 0.1      settings for every run that does not set them itself

Finished runs are skipped and interrupted ones resume, so the same command can be run again at any time.
"""

import argparse
import importlib
import itertools
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

# Each line: the tables it belongs to; what runs (networks for train.py, `all` as defined below, or another
# script); its settings. a|b: one run with a, then one with b. Defaults reproduce the recipe (Adam, lr 0.001,
# batch 64, 10 epochs). A run listed twice runs once. aggregate.py lays out its tables in this order.
STUDY = """
all = resnet18 --pretrained|densenet121|efficientnet_b0 --pretrained|custom

overfitting                         custom    --aug none --epochs 30
initial,augmentation,weight-decay   all       --aug none
augmentation                        all       --aug flip|rotation|crop|jitter|autoaugment|cutout
hybrid,learning-rate                all       --aug hybrid
learning-rate                       all       --aug hybrid --lr 0.002|0.0005
optimizer,dropout                   custom    --aug hybrid
optimizer                           custom    --aug hybrid --optimizer adagrad|adamax
weight-decay                        all       --aug none --weight-decay 0.0001|0.0002|0.00005
dropout                             custom    --aug hybrid --dropout 0.1
dropout,moe,beyond-moe              custom    --aug hybrid --dropout 0.2
dropout                             custom    --aug hybrid --dropout 0.3|0.4
moe,beyond-moe                      custom    --aug hybrid --dropout 0.2 --classes vehicles
moe                                 custom    --aug hybrid --dropout 0.2 --classes cat,deer,dog,horse
moe                                 moe
fewshot,beyond-fewshot              fewshot   --fraction 0.001|0.002|0.005|0.01|0.02|0.05|0.1
regular,beyond-fewshot              custom    --aug flip+autoaugment --fraction 0.001|0.002 --batch-size 4
regular,beyond-fewshot              custom    --aug flip+autoaugment --fraction 0.005 --batch-size 8
regular,beyond-fewshot              custom    --aug flip+autoaugment --fraction 0.01 --batch-size 16
regular,beyond-fewshot              custom    --aug flip+autoaugment --fraction 0.02 --batch-size 32
regular,beyond-fewshot              custom    --aug flip+autoaugment --fraction 0.05|0.1
samples                             augment
beyond                              custom    --aug none
beyond                              custom    --schedule onecycle --aug none|flip+translate
beyond                              custom    --schedule onecycle --aug flip+translate --label-smoothing 0.1
beyond                              custom    --schedule onecycle --aug flip+translate --label-smoothing 0.1 --epochs 30
beyond                              resnet18  --aug none
beyond                              resnet18  --schedule onecycle --aug none
beyond                              resnet18  --schedule onecycle --stem small --aug none|flip+translate
beyond                              resnet18|densenet121|efficientnet_b0  --schedule onecycle --stem small --aug flip+translate --label-smoothing 0.1
beyond                              resnet18|densenet121|efficientnet_b0  --schedule onecycle --stem small --aug flip+translate --label-smoothing 0.1 --epochs 30
beyond                              resnet18  --schedule onecycle --stem small --aug flip+translate --label-smoothing 0.1 --epochs 30 --optimizer sgd --momentum 0.9 --lr 0.05 --weight-decay 0.0005
beyond-fewshot                      custom    --aug flip+translate+autoaugment --schedule onecycle --batch-size 32 --steps-per-epoch 300 --fraction 0.001|0.002|0.005|0.01|0.02|0.05|0.1
beyond-moe                          custom    --aug hybrid --dropout 0.2 --classes animals
beyond-moe                          moe       --train-adapters --adapter-width 512 --animals all
"""
# Choices that the slides leave open: learning rates, optimizers and dropout rates are compared on hybrid (as the
# report says), and the experts are trained on it with the best dropout rate; weight decay is compared without
# augmentation. The beyond... lines are ours, not the slides'; 10 epochs of 300 steps match few-shot's 3,000.

SMOKE = {"only": "all", "from_scratch": True, "data": "synthetic-small", "seeds": "1", "jobs": 2,
         "out": "smoke/results", "figures": "smoke/figures"}  # fmt: skip
SMOKE_SETTINGS = ["--epochs", "1", "--fraction", "0.1", "--episodes", "5", "--shot", "1", "--query", "1"]
# Excluded from --smoke: fractions too small for its images, and long runs beyond the study
NOT_SMOKE = r"--fraction 0\.00|--steps-per-epoch|^beyond (?!--arch custom)|^beyond .*--epochs 30"
FOLDER = Path(sys.argv[0]).parent  # of the scripts, as typed
signals = []  # SIGINT or SIGTERM, once received


def lines():
    """Yield (tables, script, command-line words) for each run of the study."""
    every_network, *rows = STUDY.strip().splitlines()
    every_network = every_network.removeprefix("all = ")
    for tables, what, *words in (row.split() for row in rows if row):
        networks = every_network if what == "all" else what
        choices = [word.split("|") for word in (*words, networks)]
        for *settings, network in itertools.product(*choices):
            if what in ("moe", "fewshot", "augment"):
                yield tables.split(","), what, settings
            else:
                yield tables.split(","), "train", ["--arch", *network.split(), *settings]


# Commands


def parse_arguments(words):
    """The options; args.settings: those after --. Raises ValueError or ArgumentError for invalid ones."""
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser("run_all.sh", None, __doc__, allow_abbrev=False, exit_on_error=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--only", default="slides", metavar="A,B", help="tables by name, or all (default: the slides')")
    add("--arch", default="all", metavar="A,B", help="resnet18, densenet121, efficientnet_b0, custom")
    add("--from-scratch", action="store_true", help="no ImageNet weights for resnet18 and efficientnet_b0")
    add("--data", default="cinic10", help="as for train.py (default: %(default)s)")
    add("--root", default="data", help="as for train.py (default: %(default)s)")
    add("--seeds", default="1 2 3", metavar='"1 2"', help='of every run (default: "%(default)s")')
    add("--out", default="results", help="folder; a log of each run in OUT/logs (default: %(default)s)")
    add("--figures", default="figures", help="folder (default: %(default)s)")
    add("--jobs", type=int, metavar="N", help="runs at a time (default: one per GPU)")
    add("--smoke", action="store_true", help="every table, tiny, on generated images")
    add("--list", action="store_true", help="print the commands, one per line, and run nothing")
    if "--smoke" in words[:end]:
        parser.set_defaults(**SMOKE)
    parser.set_defaults(settings=words[end + 1 :])
    args, unknown = parser.parse_known_args(words[:end])
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}: see --help; settings (but --seeds) come after --")
    for name, value in vars(args).items():
        if value == "":
            raise ValueError(f'--{name} "": a value is missing')
    if not re.fullmatch("[0-9]+( [0-9]+)*", args.seeds):
        raise ValueError(f'--seeds "{args.seeds}": must be numbers separated by spaces')
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: must be at least 1")
    check("--only", args.only, {"all", "slides"}.union(*(tables for tables, _, _ in lines())))
    check("--arch", args.arch, {"all"} | {words[1] for _, script, words in lines() if script == "train"})
    return args


def check(option, names, choices):
    for name in names.split(","):
        if name not in choices:
            name = name or f"{names} (a name is missing)"
            raise ValueError(f"{option} {name}: choose from {' '.join(sorted(choices))}")


def sort_settings(words):
    """{script: the settings after -- that its parser accepts}. Raises ValueError for one that none accepts."""
    if not words:
        return {}
    parsers = {name: importlib.import_module(name).make_parser() for name in ("train", "fewshot", "moe")}
    of_script = {name: [] for name in parsers}
    settings = []
    for word in words:
        if word.startswith("-") or not settings:
            settings.append([])
        settings[-1].append(word)  # an option and its values
    for setting in settings:
        if setting[0].split("=")[0] in ("--seed", "--data", "--root", "--out", "--help", "-h"):
            raise ValueError(f"{setting[0]}: belongs before -- (seeds as --seeds)")
        scripts = [name for name, parser in parsers.items() if not parser.parse_known_args(setting)[1]]
        if not scripts:
            raise ValueError(f"{' '.join(setting)}: no option of train.py, fewshot.py or moe.py")
        for name in scripts:
            of_script[name] += setting
    return of_script


def make_commands(args):
    """{command, a tuple of words: its log file}. Raises ValueError if there is nothing to run."""
    of_script = sort_settings([*SMOKE_SETTINGS, *args.settings] if args.smoke else args.settings)
    data = ["--data", args.data] if args.data != "cinic10" else []
    root = ["--root", args.root] if args.root != "data" else []
    out = ["--out", args.out] if args.out != "results" else []
    logs = {}
    for tables, script, words in lines():
        names = {"all", *tables, *("slides" for table in tables if not table.startswith("beyond"))}
        if names.isdisjoint(args.only.split(",")):
            continue
        if script == "train" and {"all", words[1]}.isdisjoint(args.arch.split(",")):
            continue
        if args.smoke and re.search(NOT_SMOKE, " ".join([",".join(tables), *words])):
            continue
        if args.smoke and args.data == SMOKE["data"] and "--fraction" in words:
            place = words.index("--fraction")
            words[place:place] = ["--data", "synthetic"]  # larger: few-shot needs two images of a class
        if args.from_scratch:
            words = [word for word in words if word != "--pretrained"]
        # A line's own settings come last, so they take precedence
        command = ["python", f"{FOLDER / script}.py", *data, *of_script.get(script, []), *words]
        if script == "augment":
            command += ["--root", args.root, "--out", f"{args.figures}/augmentation.png"]
        else:
            command += [*root, *out, "--seed", *args.seeds.split()]
        name = re.sub("[^A-Za-z0-9.+]+", "-", " ".join([script, *words]))
        logs.setdefault(tuple(command), Path(args.out, "logs", f"{name}.log"))
    if not logs:
        raise ValueError(f"nothing to run: no run is in --only {args.only} and --arch {args.arch}")
    return logs


# Running


def share_out(jobs):
    """The GPU of each concurrent run; None on a CPU. The runs share the cores."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")  # an empty one hides all GPUs
    if listed is None:
        status, listed = subprocess.getstatusoutput("nvidia-smi --query-gpu=index --format=csv,noheader")
        listed = listed if status == 0 else ""
    gpus = listed.replace(",", " ").split() or [None]
    jobs = jobs or len(gpus)
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // jobs)))
    return [gpus[number % len(gpus)] for number in range(jobs)]


def start(command, log, gpu, fork):
    """Start a run. fork: in a copy of this process, since a tiny run spends most of its time importing torch."""
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    with open(log, "wb") as file:
        if not fork:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env)
        context = multiprocessing.get_context("fork")
        process = context.Process(target=run_here, args=(command, file.fileno(), env))
        process.poll = lambda: process.exitcode  # like Popen's
        process.start()
        return process


def run_here(command, log, env):
    """Run the command in this process, a forked copy."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(env)
    sys.argv = list(command[1:])
    runpy.run_path(command[1], run_name="__main__")


def wait(processes):
    """Return the first process that ends. After a signal, stop all of them and raise KeyboardInterrupt."""
    while not signals:
        for process in processes:
            if process.poll() is not None:
                return process
        time.sleep(0.05)
    for process in processes:
        process.terminate()
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
    raise KeyboardInterrupt


def call(script, *words):
    """Run a script in the foreground. Returns its exit status."""
    return wait([subprocess.Popen(["python", f"{FOLDER / script}", *words])]).poll()


def run_all(logs, gpus, fork, statuses):
    """Run all commands, len(gpus) at a time, and fill statuses, {command: exit status}."""
    began, trained, running = time.monotonic(), 0, {}
    # Mixtures need networks that other runs train
    mixtures = [command for command in logs if command[1].endswith("moe.py")]
    for waiting in ([command for command in logs if command not in mixtures], mixtures):
        while waiting or running:
            while waiting and gpus:
                command, gpu = waiting.pop(0), gpus.pop(0)
                running[start(command, logs[command], gpu, fork)] = command, gpu
            names = [logs[command].stem for command, _ in running.values()]
            show(len(logs), statuses, names, (time.monotonic() - began) / trained if trained else 0)
            process = wait(running)
            command, gpu = running.pop(process)
            gpus.append(gpu)
            statuses[command] = process.poll()
            trained += "train loss" in logs[command].read_text(errors="replace")  # else it was skipped
    show(len(logs), statuses, [], 0)
    print("\n", flush=True)


def show(total, statuses, names, seconds):
    """Print progress, redrawn in place on a terminal. names: current runs; seconds: estimate for a run."""
    failed = sum(status != 0 for status in statuses.values())
    minutes = int(seconds * (total - len(statuses)) / 60)
    line = f"{len(statuses)}/{total} done"
    line += f", {failed} failed" if failed else ""
    line += f", about {minutes // 60} h {minutes % 60} min left" if seconds else ""
    line = " | ".join([line, *names])
    if sys.stdout.isatty():
        print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
    else:
        print(line, flush=True)


def main():
    try:
        args = parse_arguments(sys.argv[1:])
        gpus = [] if args.list else share_out(args.jobs)  # before the import of torch
        logs = make_commands(args)
        if args.list:
            print(*map(shlex.join, logs), sep="\n")
            return
        for folder in (args.figures, f"{args.out}/logs"):
            os.makedirs(folder, exist_ok=True)
    except (ValueError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    figures = ["--figures", args.figures] if find_spec("matplotlib") else []
    if not figures:
        logs = {command: log for command, log in logs.items() if not command[1].endswith("augment.py")}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    fork = args.smoke and sys.platform == "linux"  # macOS frameworks do not work in a forked process
    for module in ("torch._dynamo", "torchvision") if fork else ():
        importlib.import_module(module)
    statuses, tables = {}, 0
    try:
        if not args.data.startswith("synthetic"):  # once, before all runs need it
            status = call("data.py", "--data", args.data, "--root", args.root)
            if status != 0:
                sys.exit(status)
        run_all(logs, gpus, fork, statuses)
        if any(Path(args.out).glob("*/seed*.json")):
            tables = call("aggregate.py", args.out, *figures)
    except KeyboardInterrupt:
        print(f"\n{len(statuses)} of {len(logs)} runs have ended; start again to resume", file=sys.stderr)
        sys.exit(128 + signals[0])

    if not figures:
        print("no figures: pip install matplotlib, and start again")
    failed = [command for command in logs if statuses[command] != 0]
    if failed:
        print(f"\n{len(failed)} of {len(logs)} runs failed:")
    for command in failed:
        last = logs[command].read_text(errors="replace").splitlines()[-1:]
        if statuses[command] < 0:
            last = [f"killed by signal {-statuses[command]}"]
        print(f"  {shlex.join(command)}\n    {logs[command]}: {''.join(last)}")
    sys.exit(1 if failed or tables != 0 else 0)


if __name__ == "__main__":
    main()
