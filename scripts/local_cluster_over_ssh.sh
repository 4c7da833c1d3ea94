#!/usr/bin/env bash
# Ray's cluster launcher for real, on one machine: two hosts, each with its own network, processes, /tmp and home, and an
# sshd; `ray up` with the files of configs/cluster/on_premise.yaml, two jobs across both hosts, `ray down`.
#
#   sudo scripts/local_cluster_over_ssh.sh
#
# Needs root (namespaces), and sshd, rsync, ip and unshare (Debian: apt-get install openssh-server rsync iproute2). It
# touches no Ray and no sshd of the machine itself, talks to 10.213.7.0/24 on a bridge of its own, and leaves nothing.
#
#   PYTHON  interpreter of an environment with the project's dependencies  (default: .venv/bin/python)
#   KEEP    1: keep the logs                                               (default: 0)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
VENV=$(cd "$(dirname "$PYTHON")/.." && pwd)
RAY=$VENV/bin/ray

NET=10.213.7
HOSTS=(crsm-head crsm-worker)
ADDRESSES=("$NET.2" "$NET.3")
FORWARD=18265
BRIDGE=crsm$$ # the names of devices that were deleted stay taken for a while

for tool in /usr/sbin/sshd rsync ip unshare ssh-keygen; do
    command -v "$tool" >/dev/null || { echo "error: $tool is missing; Debian: apt-get install openssh-server rsync iproute2" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "error: network namespaces need root; allowed: sudo $0" >&2; exit 2; }

WORK=$(mktemp -d /tmp/crsm-ssh-XXXX)
mkdir -p "$WORK/shared" "$WORK/laptop/.ray"
export HOME=$WORK/laptop RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PATH=$VENV/bin:$PATH
export RAY_TMPDIR=$WORK/laptop/tmp TMPDIR=$WORK/laptop/tmp
unset RAY_ADDRESS RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH PYTHONPATH
mkdir -p "$RAY_TMPDIR"
PIDS=()

finish() {
    status=$?
    set +e
    [ "$status" = 0 ] || tail -n 30 "$WORK"/*.log
    # unshare passes over SIGTERM; with it go all processes of its host.
    for pid in "${PIDS[@]}"; do kill -KILL "$pid" 2>/dev/null; done
    wait 2>/dev/null
    for host in "${HOSTS[@]}"; do ip netns del "$host" 2>/dev/null; done
    ip link del "$BRIDGE" 2>/dev/null
    if [ "${KEEP:-0}" = 1 ]; then echo "logs: $WORK"; else rm -rf "$WORK"; fi
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

say() { printf '\n== %s\n' "$*"; }

say "two hosts on $NET.0/24"
ssh-keygen -q -t ed25519 -N '' -f "$WORK/key"
ssh-keygen -q -t ed25519 -N '' -f "$WORK/hostkey"
ip link add "$BRIDGE" type bridge
ip addr add "$NET.1/24" dev "$BRIDGE"
ip link set "$BRIDGE" up
for index in 0 1; do
    host=${HOSTS[$index]}
    mkdir -p "$WORK/$host/home/.ssh" "$WORK/$host/tmp"
    cp "$WORK/key.pub" "$WORK/$host/home/.ssh/authorized_keys"
    printf '%s\n' "Port 22" "ListenAddress ${ADDRESSES[$index]}" "HostKey $WORK/hostkey" "PermitRootLogin prohibit-password" \
        "PasswordAuthentication no" "UsePAM no" "StrictModes no" "PidFile none" "Subsystem sftp internal-sftp" \
        >"$WORK/$host/sshd_config"
    ip netns add "$host"
    ip link add "$BRIDGE-h$index" type veth peer name "$BRIDGE-g$index"
    ip link set "$BRIDGE-g$index" netns "$host"
    ip link set "$BRIDGE-h$index" master "$BRIDGE" up
    ip -n "$host" addr add "${ADDRESSES[$index]}/24" dev "$BRIDGE-g$index"
    ip -n "$host" link set lo up
    ip -n "$host" link set "$BRIDGE-g$index" up
    ip -n "$host" route add default via "$NET.1" # leads nowhere; Ray finds its own address by it
    # Its own home, /tmp and /run; the environment of Python is the machine's, and /mnt is what the hosts share.
    # shellcheck disable=SC2016
    ip netns exec "$host" unshare --pid --mount --uts --fork --mount-proc --kill-child bash -euc '
        hostname "$1"
        mount --make-rprivate /
        mount -t tmpfs tmpfs /run && mkdir -p /run/sshd
        cp "$2/$1/sshd_config" "$2/hostkey" /run/sshd/
        sed -i "s#^HostKey .*#HostKey /run/sshd/hostkey#" /run/sshd/sshd_config
        mount --bind "$2/shared" /mnt
        mkdir /run/home && mount --bind "$2/$1/home" /run/home
        sed "s#^\(root:.*\):[^:]*:\([^:]*\)\$#\1:/run/home:\2#" /etc/passwd >/run/passwd && mount --bind /run/passwd /etc/passwd
        mount --bind "$2/$1/tmp" /tmp
        exec /usr/sbin/sshd -D -e -f /run/sshd/sshd_config' host "$host" "$WORK" >"$WORK/$host.log" 2>&1 &
    PIDS+=($!)
done

say "ray get-auth-token --generate; ray up"
ray get-auth-token --generate >/dev/null
cat >"$WORK/config.py" <<'EOF'
import sys, yaml
key, venv, output, head, worker = sys.argv[1:]
tree = yaml.safe_load(open("configs/cluster/on_premise.yaml", encoding="utf-8"))
tree["cluster_name"] = "crsm-over-ssh"
tree["provider"] |= {"head_ip": head, "worker_ips": [worker]}
tree["auth"] = {"ssh_user": "root", "ssh_private_key": key}
# The environment that is there, in the place of `make setup`: the hosts have no network.
tree["setup_commands"][0] = f"ln -sfn {venv} ~/crsm/.venv"
# All actors on the other host than the drivers.
commands = tree["head_start_ray_commands"]
commands[-1] = commands[-1].replace("--head ", "--head --num-cpus=0 --object-store-memory=200000000 ")
commands = tree["worker_start_ray_commands"]
commands[-1] = commands[-1].replace("ray start", "ray start --num-cpus=4 --object-store-memory=200000000")
yaml.safe_dump(tree, open(output, "w", encoding="utf-8"))
EOF
"$PYTHON" "$WORK/config.py" "$WORK/key" "$VENV" "$WORK/cluster.yaml" "${ADDRESSES[@]}"
"$RAY" up -y --no-config-cache "$WORK/cluster.yaml" >"$WORK/up.log" 2>&1
tail -n 3 "$WORK/up.log"

say "both hosts have joined"
for _ in $(seq 60); do
    "$RAY" exec "$WORK/cluster.yaml" 'RAY_AUTH_MODE=token ray status' >"$WORK/status.log" 2>&1 || true
    grep -q '/4.0 CPU' "$WORK/status.log" && break
    sleep 2
done
sed -n '/Node status/,$p' "$WORK/status.log"
grep -q '/4.0 CPU' "$WORK/status.log"

"$RAY" dashboard -p "$FORWARD" "$WORK/cluster.yaml" >"$WORK/forward.log" 2>&1 &
PIDS+=($!)
for _ in $(seq 30); do
    "$RAY" job list --address "http://127.0.0.1:$FORWARD" >/dev/null 2>&1 && break
    sleep 1
done
submit() {
    "$RAY" job submit --address "http://127.0.0.1:$FORWARD" --working-dir . --runtime-env configs/runtime_env.yaml -- "$@"
}

say "where drivers and tasks run"
submit python -c 'import socket, ray
ray.init(log_to_driver=False)
print("driver on", socket.gethostname(), "task on", ray.get(ray.remote(lambda: socket.gethostname()).remote()))' | tee "$WORK/where.log"
grep -q "driver on crsm-head task on crsm-worker" "$WORK/where.log"

say "the demo: System 1 on the head, System 2 on the other host"
submit python -m crsm.cli demo --problems 10 --figure /mnt/demo.png

say "a stage of training, driven by the head, on a folder that both hosts see"
submit python -m jobs.stage_1_backbone --config configs/nano.yaml --set train.workers=2 --set train.threads=1 \
    --set stage_1.steps=4 --set stage_1.batch=8 --set stage_1.evaluate_problems=8 --storage /mnt/runs
test -s "$WORK/shared/runs/nano/stage_1/checkpoint/model.safetensors"

say "ray down"
"$RAY" down -y "$WORK/cluster.yaml" >"$WORK/down.log" 2>&1
# Ray is stopped on the head; the others notice within a minute or two that it is gone.
for address in "${ADDRESSES[@]}"; do
    for attempt in $(seq 100); do
        ssh -i "$WORK/key" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "root@$address" \
            '! ps -C raylet,gcs_server -o stat= | grep -qv Z' && break
        [ "$attempt" -lt 100 ] || { echo "error: Ray still runs on $address" >&2; exit 1; }
        sleep 2
    done
    echo "no Ray on $address any more"
done
say "all done"
