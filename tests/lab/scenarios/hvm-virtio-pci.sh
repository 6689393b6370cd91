# an HVM guest drives virtio devices of pcibackd's over PCI, beside QEMU's own: entropy, a disk, a network card and a console
ALONE=yes
MACHINE=hvm
TIMEOUT=700
GUEST_TIMEOUT=300
story() {
  dd if=/dev/urandom of=/tmp/disk.img bs=64k count=128 2>/dev/null
  sum=$(first_mib </tmp/disk.img)
  mkdir -p /etc/pciback
  cat >/etc/pciback/pcibackd.toml <<'END'
[[guest.hvm.virtio]]
type = "rng"
[[guest.hvm.virtio]]
type = "blk"
path = "/tmp/disk.img"
[[guest.hvm.virtio]]
type = "net"
bridge = "lab0"
[[guest.hvm.virtio]]
type = "console"
ports = [{ name = "lab" }]
END
  must "dom0 has a bridge" bridge_up lab0 10.0.3.1
  must "the backend starts" start_backend
  CREATE="pciback create"
  must "pciback starts an HVM guest" create_hvm_guest hvm
  check "its drivers take the devices" guest hvm 'for i in pci rng blk net console; do modprobe virtio_$i || exit; done; wait_until [ -b /dev/vda ]'
  check "there are random bytes" guest hvm '[ $(dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c) = 256 ]'
  check "the disk has what is in its image" has "$sum" guest hvm 'sum_of /dev/vda'
  check "messages tell of it" guest hvm 'grep -E "msi-x +virtio" /proc/interrupts | awk "{n += \$2} END {exit n == 0}"'
  check "what the guest writes" eval 'guest hvm "write_noise /dev/vda" >/tmp/written'
  check "is in the image" has "$(first_mib </tmp/disk.img)" cat /tmp/written
  check "it pings dom0 through the tap" guest hvm 'ADDRESS=10.0.3.2 nic_up && ping -c 5 -A -W 5 10.0.3.1'
  check "and dom0 pings it" ping -c 5 -A -W 5 10.0.3.2
  # Open for as long as the story lasts: what is sent while nobody is there is lost
  exec 3<>"$(port)"
  sleep 1
  check "a line goes from the guest to dom0" from_guest
  check "and one from dom0 to the guest" to_guest
  check "xl finds the console" has /dev/pts xenstore-read "/local/domain/$(xl domid hvm)/serial/28/tty"
  check "all devices are listed with their drivers" is_list_whole
  check "features are shown by name" has RING_RESET pciback virtio show hvm
  check "and what the queues are at" has '"in_flight": 0' pciback virtio show hvm --json
  terminal=$(port)
  tap=/sys/class/net/vif$(xl domid hvm).s1d
  link=$(state_of_link)
  guest_link=$(guest hvm 'cat /sys/class/net/eth0/carrier_changes')
  ping -c 40 -i 0.5 -W 30 10.0.3.2 >/tmp/ping 2>&1 &
  pinging=$!
  must "it is killed" kill_backend
  echo "while nobody is there" >&3
  check "what keeps the tap goes on" has "$link" state_of_link
  must "it starts again" start_backend
  check "the tap is the same, and its link was never down" has "$link" state_of_link
  check "the terminal is the same" [ "$(port)" = "$terminal" ]
  check "what was written meanwhile arrives" has "while nobody is there" guest hvm "$PORT; head -n 1 /dev/\$port"
  check "and so does what is written now" to_guest
  check "and what the guest writes, where it was open before" from_guest
  check "killed once more, it starts again" restart_killed
  check "and all that still holds" eval 'has "$link" state_of_link && to_guest && from_guest'
  wait $pinging
  check "pings went on, with one lost by each kill at most" pings_went_on
  check "the guest has seen no change of its link" has "$guest_link" guest hvm 'cat /sys/class/net/eth0/carrier_changes'
  check "and the disk still reads" guest hvm 'sum_of /dev/vda'
  check "and the network is there" guest hvm 'ping -c 5 -A -W 5 10.0.3.1'
  must "it is killed once more" kill_backend
  mv /tmp/disk.img /tmp/gone.img
  must "and starts without the disk's image" start_backend
  check "the disk waits for it" is_waiting
  check "and the log says so" wait_for 10 grep "blk device in slot 1e has to wait" $LOG
  guest hvm 'sum_of /dev/vda' >/tmp/read 2>&1 &
  reading=$!
  check "the network is there all the same" ping -c 5 -A -W 5 10.0.3.2
  check "and so is the terminal" [ "$(port)" = "$terminal" ]
  check "who reads the disk waits" nothing_is_read
  mv /tmp/gone.img /tmp/disk.img
  wait $reading
  check "when it is back he reads what is in it" has "$(first_mib </tmp/disk.img)" cat /tmp/read
  check "and the disk is served" is_list_whole
  check "a guest that runs gets no more" has "runs already" eval 'pciback virtio add hvm --type rng 2>&1; true'
  check "the guest is destroyed" destroy hvm
  check "its tap is gone, and its terminal" wait_for 10 nothing_is_kept
  check "nothing of it is left in Xen" wait_for 10 no_zombie
  check "a guest whose disk is missing does not start" has "destroyed again" fails_to_create --virtio type=blk,path=/none
  check "nor one with a device in a slot of QEMU's" has "taken by QEMU" fails_to_create --virtio type=rng,slot=02
}

# The other end of the port
port() { pciback virtio list | sed -n 's|.*lab: \(/dev/pts/[0-9]*\).*|\1|p'; }

# What the guest calls the port. There is no udev in it
PORT='port=$(basename $(dirname $(grep -l lab /sys/class/virtio-ports/*/name)))'

state_of_link() { (cd "$tap" && cat ifindex carrier carrier_changes | tr '\n' ' '); }

pings_went_on() { cat /tmp/ping; [ "$(grep -c 'bytes from' /tmp/ping)" -ge 38 ]; }

is_waiting() { pciback virtio list | grep -E 'slot 1e +blk +waiting +modern +.*disk.img' || { pciback virtio list; return 1; }; }
nothing_is_read() { sleep 3 && [ ! -s /tmp/read ]; }

# A terminal that is hung up takes nothing
nothing_is_kept() { [ ! -e "$tap" ] && ! echo >&3; }

from_guest() {
  local line
  guest hvm "$PORT; echo from the guest >/dev/\$port" || return
  line=$(timeout 20 head -n 1 <&3)
  [ "$line" = "from the guest" ] || { echo "it said: $line"; return 1; }
}

to_guest() {
  echo "from dom0" >&3
  has "from dom0" guest hvm "$PORT; head -n 1 /dev/\$port"
}

is_list_whole() { pciback virtio list | awk '/ served +modern / {n++} END {exit n != 4}' || { pciback virtio list; return 1; }; }

fails_to_create() {
  pciback create /tmp/hvm.cfg "$@" 2>&1 && return 1
  guest_is_gone hvm
}
