# Run a command twice, as on two machines: in this network namespace and in a new one, with a cable between them.
# Needs a namespace of its own: unshare --map-root-user --net sh two_machines.sh COMMAND…
# The command finds in its environment which machine it is on (for torchrun), and on which interface to talk (for gloo).

ip link set lo up
PET_NODE_RANK=1 GLOO_SOCKET_IFNAME=there unshare --net sh -c '
    ip link set lo up
    until ip link show there >/dev/null 2>&1; do sleep 0.1; done
    ip address add 10.77.0.2/24 dev there && ip link set there up && exec "$@"' second "$@" &
second=$!
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.1; done
ip link add here type veth peer name there netns $second || exit
ip address add 10.77.0.1/24 dev here && ip link set here up || exit
PET_NODE_RANK=0 GLOO_SOCKET_IFNAME=here "$@"
first=$?
wait $second && exit $first
