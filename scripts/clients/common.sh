# Sourced by the scripts beside it. Each installs a client into an environment of its own and runs it against 1P1D.
#
#   packages NAME ...    installs packages of PyPI; prints their versions
#   cluster [KEY=VALUE]  starts 1P1D with the demo model on free ports, with these settings (as `--set` has them)
#   client [ARG ...]     runs the Python program on standard input, with URL in its environment
#
# With KVRELAY_URL set no cluster is started, and that one is asked.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
cluster_pid=
"$root/scripts/setup"
export NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost

clean_up() {
    if [ -n "$cluster_pid" ]; then
        kill "$cluster_pid" 2>/dev/null || true
        wait "$cluster_pid" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

packages() {
    export UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1
    local python=$work/venv/bin/python
    if ! { "$root/.venv/bin/uv" venv --quiet "$work/venv" &&
        "$root/.venv/bin/uv" pip install --quiet --python "$python" "$@"; } 2>/dev/null; then
        "$root/.venv/bin/python" -m venv --clear "$work/venv"
        "$python" -m pip install --quiet --disable-pip-version-check "$@"
    fi
    local package
    for package in "$@"; do
        package=${package%%[<>=[]*}
        "$python" -c "import importlib.metadata as m; print('$package', m.version('$package'))"
    done
}

cluster() {
    if [ -n "${KVRELAY_URL:-}" ]; then
        export URL=$KVRELAY_URL
        return
    fi
    local ports
    read -r -a ports < <("$root/.venv/bin/python" - <<'PYTHON'
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
print(*(each.getsockname()[1] for each in sockets))
PYTHON
    )
    export URL=http://127.0.0.1:${ports[0]}
    cat > "$work/cluster.yaml" <<YAML
model: {path: $root/models/demo, served_name: demo, max_model_len: 4096, aliases: [gpt-4o, gpt-4o-mini]}
router: {host: 127.0.0.1, port: ${ports[0]}, admin_port: ${ports[1]}, control: "tcp://127.0.0.1:${ports[2]}"}
cache: {block_size: 16, num_blocks: 2048}
nodes:
  - {name: p0, role: prefill, host: 127.0.0.1, port: ${ports[3]}, threads: 1}
  - {name: d0, role: decode, host: 127.0.0.1, port: ${ports[4]}, threads: 1}
YAML
    local settings=() setting
    for setting in "$@"; do settings+=(--set "$setting"); done
    (cd "$root" && exec .venv/bin/kvrelay up "$work/cluster.yaml" "${settings[@]}") > "$work/log" 2>&1 &
    cluster_pid=$!
    local try
    for try in $(seq 600); do
        curl --silent --fail --noproxy '*' --output /dev/null "$URL/ready" && return
        kill -0 "$cluster_pid" 2>/dev/null || break
        sleep 0.2
    done
    cat "$work/log" >&2
    echo "the cluster did not become ready" >&2
    return 1
}

client() {
    "$work/venv/bin/python" - "$@"
}
