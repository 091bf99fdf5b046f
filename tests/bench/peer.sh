# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Functions of the scripts in peers/. Each script creates a device, prints its path, waits for the end of standard input,
# and removes the device. If the peer is not available, it prints the reason and exits with 77. The environment has
# QUEUES, DEPTH, SIZE in bytes, and FILE, a file of that size in memory.

set -u
BENCH=$(cd "${0%/*}/.." && pwd)

absent() {
	echo "$*" >&2
	exit 77
}

need_module() {
	modprobe "$@" 2>/dev/null || absent "the kernel has no module $1"
}

need() {
	command -v "$1" >/dev/null || absent "there is no $1 here"
}

# serve PATH: print the path and wait for the end of standard input.
serve() {
	echo "$1"
	cat >/dev/null
}

# kublk TARGET OPTION...
kublk() {
	need kublk
	target=$1
	shift
	said=$(command kublk add -t "$target" -q "$QUEUES" -d "$DEPTH" "$@" 2>&1) || absent "kublk: $said"
	number=$(echo "$said" | sed -n 's/^dev id \([0-9]*\).*/\1/p')
	serve "/dev/ublkb$number"
	command kublk del -n "$number" >/dev/null
}

# rublk ARGUMENT...
rublk() {
	need rublk
	target=$1
	shift
	before=$(echo /dev/ublkb*)
	command rublk add "$target" -q "$QUEUES" -d "$DEPTH" "$@" >/tmp/rublk 2>&1 || absent "rublk: $(cat /tmp/rublk)"
	for path in /dev/ublkb*; do
		case " $before " in *" $path "*) ;; *) break ;; esac
	done
	[ -b "$path" ] || absent "rublk has made no device: $(cat /tmp/rublk)"
	serve "$path"
	command rublk del -n "${path#/dev/ublkb}" >/dev/null
}

# ublk OPTION...
ublk() {
	path=$(command ublk add -q "$QUEUES" -d "$DEPTH" "$@") || absent "ublk add fails"
	serve "$path"
	command ublk del -n "${path#/dev/ublkb}"
}

# nbd PLUGIN ARGUMENT..., with $THREADS threads
nbd() {
	need nbdkit
	need nbd-client
	need_module nbd nbds_max=1
	socket=/tmp/nbdkit.socket
	rm -f $socket
	nbdkit --exit-with-parent --foreground --unix $socket --threads "${THREADS:-16}" "$@" &
	server=$!
	tries=0
	until [ -S $socket ] || [ $tries = 100 ]; do
		tries=$((tries + 1))
		sleep 0.1
	done
	nbd-client -unix $socket /dev/nbd0 -connections "$QUEUES" >/tmp/nbd-client 2>&1 || absent "$(cat /tmp/nbd-client)"
	serve /dev/nbd0
	nbd-client -d /dev/nbd0 >/dev/null 2>&1
	kill $server
	wait $server
	modprobe -r nbd
}

# python CLASS [COALESCE_USECS]
python() {
	exec python3 "$BENCH/disks.py" "$@"
}
