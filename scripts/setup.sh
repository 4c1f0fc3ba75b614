# To be sourced by bash: `source scripts/setup.sh [core|dev|docs]` sets PYTHON to a Python that runs
# this checkout, and makes .venv where there is none that does. dev adds what the tests need, docs what
# the site does.
#
# .venv if it is there; else python3 if it has all that is needed; else a new .venv. What is
# installed and new enough is kept; what is missing comes at the version of constraints.txt.
# A stamp, written last, makes the next call quick and an interrupted one go on where it stopped.

_setup_error() {
    echo "error: $*" >&2
    return 1
}

# All that the state of .venv depends on; the stamp is a copy of it.
_setup_inputs() {
    echo "$1"
    cat "$1/pyproject.toml" "$1/constraints.txt"
}

_setup_is_done() { # root group
    [[ -x $1/.venv/bin/python ]] && _setup_inputs "$1" | cmp -s - "$1/.venv/setup-$2"
}

_setup_check_version() { # python
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
        { _setup_error "$1 does not run: mend or remove it, then run again"; return; }
    [[ ${version%%.*} -gt 3 || ( ${version%%.*} -eq 3 && ${version#*.} -ge 10 ) ]] ||
        _setup_error "$1 is Python $version; torchtitan_mtp needs 3.10 or newer first in PATH"
}

_setup_announce() { # requirement lines
    local torch names
    torch=$(sed -n 's/^torch==\([^;]*\).*/torch \1 and /p' <<<"$1")
    names=$(sed 's/[=<>; ].*//; /^torch$/d' <<<"$1" | sort -u)
    echo "installing $torch$(wc -w <<<"$names" | tr -d ' ') packages into .venv (once)" >&2
}

# A new .venv. Where python3 has a new enough torch, system-wide, in a container or in a virtual
# environment of its own, .venv sees python3's packages, so that this torch is the one in use.
_setup_create_venv() { # root group
    local venv=$1/.venv missing outer=''
    missing=$(python3 "$1/scripts/missing_requirements.py" "$2" 2>/dev/null) || missing=torch==
    grep -q '^torch==' <<<"$missing" ||
        outer=$(python3 -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))')
    python3 -m venv --without-pip "$venv" >&2 || return
    [[ -z $outer ]] || echo "$outer" >"$(echo "$venv"/lib/python*/site-packages)/outer.pth"
}

_setup_install() { # root group
    local root=$1 group=$2 venv=$1/.venv missing
    [[ -x $venv/bin/python ]] || _setup_create_venv "$root" "$group" ||
        { _setup_error "python3 -m venv $venv failed: see above"; return; }
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check)
    "${pip[@]}" --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip --default-pip >/dev/null 2>&1 ||
        { _setup_error "no pip for $venv: install python3-venv or ensurepip, then run again"; return; }
    missing=$("$venv/bin/python" "$root/scripts/missing_requirements.py" "$group") || return
    if [[ -n $missing ]]; then
        _setup_announce "$missing"
        "${pip[@]}" install -qq -r <(echo "$missing") >&2 ||
            { _setup_error "pip could not install into $venv: see above, then run again"; return; }
    fi
    "${pip[@]}" install -qq --no-deps -e "$root" >&2 ||
        { _setup_error "pip could not install $root into $venv: see above, then run again"; return; }
    _setup_inputs "$root" >"$venv/setup-core"
    [[ $group == core ]] || _setup_inputs "$root" >"$venv/setup-$group"
}

_setup_install_alone() { # root group; one at a time in one checkout, where the system has flock
    (
        if command -v flock >/dev/null; then
            flock -n 9 || { echo "waiting for another set-up of .venv to end" >&2; flock 9; }
        fi
        _setup_is_done "$1" "$2" || _setup_install "$1" "$2"
    ) 9<"$1"
}

_setup() { # group
    local root python
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P) || return
    [[ $1 == core || $1 == dev || $1 == docs ]] ||
        { _setup_error "setup.sh takes core, dev or docs, got '$1'"; return; }
    # This checkout before any installed copy, also where nothing had to be installed.
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    PYTHON=$root/.venv/bin/python
    _setup_is_done "$root" "$1" && return
    python=$PYTHON
    [[ -x $python ]] || python=$(command -v python3) ||
        { _setup_error "python3 is not in PATH: install Python 3.10 or newer"; return; }
    _setup_check_version "$python" || return
    if [[ $python != "$PYTHON" ]] &&
        [[ -z $("$python" "$root/scripts/missing_requirements.py" "$1" 2>&1) ]]; then
        PYTHON=$python
        return
    fi
    _setup_install_alone "$root" "$1"
}

_setup "${1:-core}"
