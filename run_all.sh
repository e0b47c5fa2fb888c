#!/usr/bin/env bash
# Every run behind the tables and figures of the slides, and then the tables: starts study.py, which defines them.
#
#   bash run_all.sh --smoke                every table, tiny, on generated images: minutes
#   bash run_all.sh                        the slides' study: CINIC-10, seeds 1 2 3
#   bash run_all.sh --help                 every option
exec python "$(dirname "$0")/study.py" "$@"
