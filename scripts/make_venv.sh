#!/bin/sh
# sh scripts/make_venv.sh [PYTHON]: make .venv with PYTHON, or with the newest of Python 3.13, 3.12 and 3.11 that is here.
# A .venv that works is kept, whichever Python it has.
set -eu

version_of() { # its version, if it starts: pyenv has commands that do not
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

can_make_venv() { # Debian has ensurepip in a package of its own
    "$1" -c 'import ensurepip, venv' 2>/dev/null
}

say_what_to_install() {
    if [ -n "$incomplete" ]; then
        version=$(version_of "$incomplete")
        echo "$incomplete cannot make a virtual environment, because a part of it is missing. Install that part:"
        echo "  sudo apt-get install python$version-venv"
    else
        echo "There is no Python 3.13, 3.12 or 3.11 here. Install one of them, as it suits you:"
        echo "  sudo apt-get install python3 python3-venv    (Ubuntu 24.04, Debian 12 and 13)"
        echo "  uv python install 3.13"
        echo "  pyenv install 3.13 && pyenv local 3.13"
        echo "or say where it is: make setup PYTHON=/path/to/python3.12"
    fi
} >&2

wanted=${1:-}
if .venv/bin/python -m pip --version >/dev/null 2>&1; then
    echo "using the .venv that is here, of Python $(version_of .venv/bin/python)"
    if [ -n "$wanted" ] && [ "$(version_of "$wanted")" != "$(version_of .venv/bin/python)" ]; then
        echo "note: for one of $wanted delete .venv first"
    fi
    exit
fi

python="" incomplete=""
for candidate in ${wanted:+"$wanted"} $([ -n "$wanted" ] || echo python3.13 python3.12 python3.11 python3); do
    case $(version_of "$candidate") in
    3.11 | 3.12 | 3.13) ;;
    3.1[4-9]) if [ -n "$wanted" ]; then echo "note: $wanted is newer than what this was tested with"; else continue; fi ;;
    *) continue ;;
    esac
    if can_make_venv "$candidate"; then
        python=$candidate
        break
    fi
    incomplete=${incomplete:-$candidate}
done

if [ -z "$python" ]; then
    if [ -n "$wanted" ] && [ -z "$incomplete" ]; then
        echo "PYTHON=$wanted is not a Python of 3.11 or newer" >&2
    else
        say_what_to_install
    fi
    exit 1
fi
echo "making .venv with $python (Python $(version_of "$python"))"
"$python" -m venv --clear .venv
