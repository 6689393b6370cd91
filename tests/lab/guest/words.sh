# The words for commands that run in a guest

# nic_up [DRIVER...]: loads it and brings the first network card up, at $ADDRESS (10.0.2.15 if not said)
nic_up() {
  for module in "$@"; do modprobe "$module" || return; done
  wait_until [ -e /sys/class/net/eth0 ] || return
  ip link set eth0 up || return
  ip addr add ${ADDRESS:-10.0.2.15}/24 dev eth0
  wait_until grep -q 1 /sys/class/net/eth0/carrier
}

# card_up MAC ADDRESS: the network card with this hardware address
card_up() {
  local card
  wait_until grep -l "$1" /sys/class/net/*/address || return
  card=$(grep -l "$1" /sys/class/net/*/address | cut -d/ -f5)
  ip link set "$card" up && ip addr add "$2/24" dev "$card"
}

# per_second COUNT COMMAND...: how many that is, if the command does COUNT of something
per_second() {
  local count="$1" begin end
  shift
  read -r begin _ </proc/uptime
  "$@" >/dev/null 2>&1 || return
  read -r end _ </proc/uptime
  echo "$count $begin $end" | awk '{printf "%.2f\n", $1 / ($3 - $2)}'
}

# wait_until COMMAND...: half a minute at most
wait_until() {
  for _ in $(seq 150); do
    "$@" 2>/dev/null && return
    sleep 0.2
  done
  echo "in vain: $*"
  return 1
}

# sum_of DISK: of its first MiB, past the page cache
sum_of() { wait_until [ -b "$1" ] && dd if="$1" bs=64k count=16 iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1; }

# write_noise DISK: random bytes into its first MiB; prints what sum_of is to be then
write_noise() {
  dd if=/dev/urandom of=/tmp/noise bs=64k count=16 2>/dev/null
  dd if=/tmp/noise of="$1" bs=64k oflag=direct 2>/dev/null && sha256sum </tmp/noise | cut -d' ' -f1
}

# start_reads BDF, end_reads: configuration reads, one after the other, in between; what came of them
start_reads() {
  rm -f /tmp/stop
  lab-guest reads "$1" /tmp/stop >/tmp/reads 2>&1 &
  wait_until grep -q reading /tmp/reads
}

end_reads() {
  touch /tmp/stop
  wait_until grep wrong /tmp/reads
}

# start_hammer DISK JOBS, end_hammer: the disk's first blocks are written and read in between; what came of it is in /tmp/hammer
start_hammer() {
  rm -f /tmp/stop
  wait_until [ -b "$1" ] || return
  { lab-guest hammer "$1" "$2" /tmp/stop || echo wrong; } >/tmp/hammer 2>&1 &
  wait_until grep -q hammering /tmp/hammer
}

end_hammer() {
  touch /tmp/stop
  wait_until grep -E 'all right|wrong' /tmp/hammer
  sed -n 's/^[0-9]* requests/VALUE hammer &/p' /tmp/hammer
  ! grep -B 1 wrong /tmp/hammer
}

# irqs: how many MSI-X interrupts this guest has had
irqs() { awk '/pcifront-msi-x/ {n += $2} END {print n + 0}' /proc/interrupts; }

# The device IDs of the guest's PCI devices, in the order of their addresses
device_ids() { cat /sys/bus/pci/devices/*/device 2>/dev/null | cut -c 3- | tr '\n' ' ' | sed 's/ $//'; }
has_devices() { [ "$(device_ids)" = "$1" ]; }

# start_ping, end_ping: five a second in between
start_ping() {
  ping -i 0.2 10.0.2.2 >/tmp/ping 2>&1 &
  echo $! >/tmp/ping.pid
  wait_until grep -q ' bytes from' /tmp/ping
}

end_ping() {
  kill -INT "$(cat /tmp/ping.pid)"
  wait_until grep 'packet loss' /tmp/ping
}

# Its module is in use as long as it has a device
unload_pcifront() { echo pci-0 >/sys/bus/xen/drivers/pcifront/unbind && rmmod xen-pcifront; }

# reload_pcifront TIMES: each time as fast as it goes, which is faster than the backend can follow
reload_pcifront() {
  for _ in $(seq "$1"); do
    unload_pcifront && modprobe xen-pcifront || return
    wait_until frontend_is 4 || return
  done
}

# rebind_pcifront TIMES: faster still
rebind_pcifront() {
  for _ in $(seq "$1"); do
    echo pci-0 >/sys/bus/xen/drivers/pcifront/unbind && echo pci-0 >/sys/bus/xen/drivers/pcifront/bind || return
    wait_until frontend_is 4 || return
  done
}

frontend_is() { [ "$(xenstore-read device/pci/0/state)" = "$1" ]; }

# disk_called SERIAL: the virtio disk's name
disk_called() { grep -l "^$1" /sys/block/vd*/serial | cut -d/ -f4 | grep .; }
