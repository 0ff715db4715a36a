# Sourced by the scripts beside it. Each installs a client into an environment of its own and runs it against 1P1D.
#
#   packages NAME ...    installs packages of PyPI; prints their versions
#   node_packages NAME   installs packages of npm; prints their versions
#   download DIR ARG ... downloads a package of PyPI without those that it needs; arguments as `pip download` has them
#   cpu_torch            installs torch's CPU build
#   debian NAME ...      unpacks packages of Debian, with what they need; prints their versions
#   cluster [KEY=VALUE]  starts 1P1D with the demo model on free ports, with these settings (as `--set` has them)
#   client [ARG ...]     runs the Python program on standard input, with URL in its environment
#   node_client          runs the JavaScript program on standard input
#   unpacked COMMAND ... runs a command of the packages that `debian` unpacked
#   serve COMMAND ...    the same for a server: in the background, until the script ends; sets server_pid
#   free_ports N         prints N free ports
#
# Environments are in .cache/clients/NAME and are used again. With KVRELAY_URL set no cluster is started, and that one is
# asked. A script whose client cannot be installed says why in one line and ends with status 3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
environment=$root/.cache/clients/$(basename "$0")
work=$(mktemp -d)
cluster_pid=
pids=()
"$root/scripts/setup"
export NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost

# No client may report to anybody what it does here.
export DO_NOT_TRACK=1 OTEL_SDK_DISABLED=true ANONYMIZED_TELEMETRY=false HAYSTACK_TELEMETRY_ENABLED=False
export CREWAI_DISABLE_TELEMETRY=true CREWAI_TRACING_ENABLED=false LITELLM_LOCAL_MODEL_COST_MAP=True NEXT_TELEMETRY_DISABLED=1

clean_up() {
    local pid
    for pid in "${pids[@]}" $cluster_pid; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

not_installed() { # not_installed WHAT: ends the script with status 3 and the installer's first error
    local reason
    reason=$(grep -i -m 1 'because' "$work/install" || grep -iE '^(npm )?error|^E:' "$work/install" | grep -m 1 -v 'npm error code') || true
    echo "cannot be installed here: $1: $reason" >&2
    exit 3
}

packages() {
    export UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1
    local python=$environment/bin/python
    if ! { { [ -x "$python" ] || "$root/.venv/bin/uv" venv --quiet --allow-existing "$environment"; } &&
        "$root/.venv/bin/uv" pip install --quiet --python "$python" "$@"; } 2>"$work/install"; then
        "$root/.venv/bin/python" -m venv --clear "$environment"
        "$python" -m pip install --quiet --disable-pip-version-check "$@" 2>>"$work/install" || not_installed "$*"
    fi
    local package
    for package in "$@"; do
        package=${package%%[<>=[]*}
        "$python" -c "import importlib.metadata as m; print('version:', '$package', m.version('$package'))"
    done
}

download() {
    local python=$root/.venv/bin/python directory=$1
    shift
    "$python" -m pip --version > /dev/null 2>&1 || "$python" -m ensurepip > /dev/null
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$directory" "$@" 2> "$work/install" ||
        not_installed "$*"
}

cpu_torch() { # torch's CPU build, for clients that need torch; PyPI has only a CUDA build of several GB
    UV_FIND_LINKS=${PIP_FIND_LINKS:-} packages "$(sed -n 's/^torch=\([^ ]*\).*/torch==\1/p' "$root/scripts/setup-torch")" > /dev/null
}

node_packages() {
    mkdir -p "$environment"
    npm install --loglevel error --no-audit --no-fund --prefix "$environment" "$@" > /dev/null 2> "$work/install" ||
        not_installed "$*"
    local package
    for package in "$@"; do
        node -p "'version: $package ' + require('$environment/node_modules/$package/package.json').version"
    done
}

debian() {
    if ! dpkg --status "$@" > /dev/null 2>&1 && [ ! -d "$environment/debian/usr" ]; then
        mkdir -p "$work/archives/partial" "$environment/debian"
        local apt=(apt-get --quiet=2 -o Debug::NoLocking=1 -o "Dir::Cache::archives=$work/archives")
        "${apt[@]}" install --yes --no-install-recommends --download-only "$@" > "$work/install" 2>&1 || {
            not_installed "$* ('apt-get update' may help)"
        }
        # Those that this machine has installed are not downloaded; `unpacked` finds them too.
        find "$work/archives" -name '*.deb' -exec dpkg --extract {} "$environment/debian" \;
    fi
    local package
    for package in "$@"; do
        echo "version: $package $(apt-cache show --no-all-versions "$package" | sed -n 's/^Version: //p')"
    done
}

become() { # replaces the shell by a command of the packages that `debian` unpacked
    export LD_LIBRARY_PATH=$environment/debian/usr/lib/$(uname -m)-linux-gnu
    PATH=$environment/debian/usr/sbin:$environment/debian/usr/bin:$PATH
    exec "$@"
}

unpacked() {
    (become "$@")
}

serve() {
    become "$@" &
    server_pid=$!
    pids+=("$server_pid")
}

free_ports() {
    "$root/.venv/bin/python" - "$1" <<'PYTHON'
import socket
import sys
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(each.getsockname()[1] for each in sockets))
PYTHON
}

answers() { # answers URL: waits until it does
    local try
    for try in $(seq 600); do
        curl --silent --fail --noproxy '*' --output /dev/null "$1" && return
        kill -0 "${2:-$$}" 2>/dev/null || return 1
        sleep 0.2
    done
    return 1
}

cluster() {
    if [ -n "${KVRELAY_URL:-}" ]; then
        export URL=$KVRELAY_URL
        return
    fi
    local ports
    read -r -a ports < <(free_ports 7)
    export URL=http://127.0.0.1:${ports[0]} ADMIN_URL=http://127.0.0.1:${ports[1]}
    export METRICS_URLS="http://127.0.0.1:${ports[5]} http://127.0.0.1:${ports[6]}"
    cat > "$work/cluster.yaml" <<YAML
model:
  path: $root/models/demo
  served_name: demo
  max_model_len: 4096
  aliases: [gpt-4o, gpt-4o-mini, gpt-3.5-turbo-instruct, gpt-6-astra]
router:
  host: 127.0.0.1
  port: ${ports[0]}
  admin_port: ${ports[1]}
  control: "tcp://127.0.0.1:${ports[2]}"
  tool_parser: hermes
cache: {block_size: 16, num_blocks: 2048}
nodes:
  - {name: p0, role: prefill, host: 127.0.0.1, port: ${ports[3]}, threads: 1, metrics_port: ${ports[5]}}
  - {name: d0, role: decode, host: 127.0.0.1, port: ${ports[4]}, threads: 1, metrics_port: ${ports[6]}}
YAML
    local settings=() setting
    for setting in "$@"; do settings+=(--set "$setting"); done
    (cd "$root" && exec .venv/bin/kvrelay up "$work/cluster.yaml" "${settings[@]}") > "$work/log" 2>&1 &
    cluster_pid=$!
    answers "$URL/ready" "$cluster_pid" && return
    cat "$work/log" >&2
    echo "the cluster did not become ready" >&2
    return 1
}

client() { # from a file, because some clients read their caller's source
    cat > "$work/program.py"
    PYTHONPATH=$root/scripts/clients "$environment/bin/python" "$work/program.py" "$@"
}

node_client() {
    (cd "$environment" && node --input-type=module -)
}
