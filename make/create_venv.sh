#!/bin/sh
# Creates the virtual environment $1 with the newest usable Python, or says which package brings one.
set -eu
venv=$1

bring() { # the install line for this system; $1 Debian, $2 Fedora, $3 macOS packages
    ids=$(sed -n 's/^ID\(_LIKE\)\{0,1\}=//p' /etc/os-release 2>/dev/null | tr -d '"' | tr '\n' ' ')
    case "$(uname -s) $ids" in
        Darwin*) echo "brew install $3" ;;
        *debian* | *ubuntu*) echo "sudo apt install $1" ;;
        *fedora* | *rhel*) echo "sudo dnf install $2" ;;
        *) echo "Debian, Ubuntu: apt install $1; Fedora: dnf install $2; macOS: brew install $3" ;;
    esac
}

old= without_venv= found=
for name in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if ! "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        old=$version
    elif ! "$name" -c 'import ensurepip, venv' 2>/dev/null; then
        without_venv=$version
    else
        found=$name
        break
    fi
done

if [ -z "$found" ]; then
    if [ -n "$without_venv" ]; then
        echo "make: Python $without_venv lacks its venv module. Install it and run the same command again:" \
            "$(bring "python$without_venv-venv" "python$without_venv" "python@$without_venv")" >&2
    else
        echo "make: Python 3.11 or later is needed${old:+; here is only $old}. Install it and run the same command" \
            "again: $(bring "python3.11 python3.11-venv" "python3.12" "python@3.13")," \
            "or name one: PYTHON=/path/to/python3.12 make ..." >&2
    fi
    exit 1
fi
echo "make: creating $venv with Python $version ($(command -v "$found"))"
"$found" -m venv --clear "$venv" || {
    echo "make: could not create $venv; see the lines above" >&2
    exit 1
}
touch "$venv/.python"
