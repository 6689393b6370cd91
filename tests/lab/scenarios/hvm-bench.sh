# speed of virtio disks and network cards, side by side with QEMU's in one guest: pcibackd, QEMU, QEMU, pcibackd, twice; disks by io_uring and past the cache
ALONE=yes
MACHINE=hvm
TIMEOUT=1800
GUEST_TIMEOUT=900
story() {
  mount -t tmpfs tmpfs /mnt
  dd if=/dev/urandom of=/mnt/disk.img bs=64k count=1024 2>/dev/null
  # Files in memory are served by threads, block devices by io_uring
  modprobe brd rd_nr=2 rd_size=16384
  for disk in /dev/ram0 /dev/ram1; do dd if=/mnt/disk.img of=$disk bs=64k count=256 2>/dev/null; done
  mkdir -p /etc/pciback
  cat >/etc/pciback/pcibackd.toml <<'END'
[[guest.hvm.virtio]]
type = "blk"
path = "/mnt/disk.img"
serial = "ours"
[[guest.hvm.virtio]]
type = "blk"
path = "/dev/ram0"
serial = "ram"
[[guest.hvm.virtio]]
type = "blk"
path = "/dev/ram1"
direct = true
serial = "direct"
[[guest.hvm.virtio]]
type = "net"
bridge = "ours"
mac = "00:16:3e:00:00:01"
END
  must "dom0 has a bridge for each network card" eval 'bridge_up ours 10.0.3.1 && bridge_up theirs 10.0.4.1'
  # Linux would have QEMU take its virtio disk away: a guest of Xen's does not need what is emulated
  GUEST_KERNEL="$GUEST_KERNEL xen_emul_unplug=never"
  must "the backend starts" start_backend
  must "an HVM guest starts" create_guest hvm 'type="hvm"; kernel="/lab/vmlinuz"; ramdisk="/lab/guest.img.gz"; memory=300' 'vga="none"; nographic=1' \
    "device_model_args_hvm=[$(device_model_args)]"
  must "QEMU's card is at its bridge" ip link set tap0 master theirs up
  echo "VALUE the device model: $(tr '\0' ' ' <"/proc/$(pidof xen-qemu-system-i386)/cmdline")"
  GUEST_TIMEOUT=120
  must "it has all disks" guest hvm 'modprobe virtio_pci && modprobe virtio_blk && for disk in ours theirs ram direct; do wait_until disk_called $disk || exit; done'
  check "io_uring is used" uses_io_uring
  is_right ram /dev/ram0 "by it"
  is_right direct /dev/ram1 "past the cache"
  measure blk_randread_qd1 requests 'lab-guest disk /dev/$(disk_called WHO) randread 4096 1 2'
  measure blk_randread_qd32 requests 'lab-guest disk /dev/$(disk_called WHO) randread 4096 32 2'
  measure blk_read_seq requests 'lab-guest disk /dev/$(disk_called WHO) read 1048576 1 2'
  measure blk_write_seq requests 'lab-guest disk /dev/$(disk_called WHO) write 1048576 1 2'
  check "idle, it does nothing" idle
  must "the guest has both cards" guest hvm 'modprobe virtio_net && card_up 00:16:3e:00:00:01 10.0.3.2 && card_up 00:16:3e:00:00:02 10.0.4.2'
  check "one reaches dom0" guest hvm 'ping -c 3 -A -W 5 10.0.3.1'
  check "and the other" guest hvm 'ping -c 3 -A -W 5 10.0.4.1'
  ours=10.0.3.1 theirs=10.0.4.1
  serve 5001 'cat >/dev/null'
  serve 5002 'cat /dev/zero'
  measure net_bulk MiB 'lab-guest stream ADDRESS:5001 send 3'
  measure net_bulk_received MiB 'lab-guest stream ADDRESS:5002 receive 3'
  measure net_ping pings 'per_second 300 ping -q -A -c 300 ADDRESS'
}

# is_right SERIAL DISK HOW
is_right() {
  check "$3 the disk has what is in its image" has "$(first_mib <$2)" guest hvm "sum_of /dev/\$(disk_called $1)"
  check "what the guest writes" eval "guest hvm 'write_noise /dev/\$(disk_called $1)' >/tmp/written"
  check "is there" has "$(first_mib <$2)" cat /tmp/written
}

uses_io_uring() {
  local fd
  for fd in "/proc/$(cat $STATE/pid)"/fd/*; do
    [ "$(readlink "$fd")" != 'anon_inode:[io_uring]' ] || return 0
  done
  return 1
}

# In quotes, with commas between, as xl wants it. tmpfs has no direct I/O, so cache=none cannot be had: both disks go through its pages. QEMU takes no
# lock, as pcibackd has one. It has no iothread: with one, this QEMU dies on Xen (blk_register_buf: Assertion `qemu_in_main_thread()' failed).
device_model_args() {
  set -- -drive if=none,id=disk,file=/mnt/disk.img,format=raw,cache=writeback,aio=threads,file.locking=off \
    -device virtio-blk-pci,drive=disk,serial=theirs \
    -netdev tap,id=net,ifname=tap0,script=no,downscript=no -device virtio-net-pci,netdev=net,mac=00:16:3e:00:00:02,romfile=
  printf '"%s",' "$@" | sed 's/,$//'
}

# measure NAME UNIT COMMAND: in the guest; WHO in it is ours or theirs, ADDRESS is dom0's at that one's bridge
measure() {
  local name="$1" unit="$2" who address figure turn=0
  for who in ours theirs theirs ours ours theirs theirs ours; do
    turn=$((turn + 1))
    eval "address=\$$who"
    figure=$(guest hvm "$(echo "$3" | sed "s/WHO/$who/; s/ADDRESS/$address/")")
    must "$name, $who" is_figure "$figure"
    echo "$figure" >>$STATE/$name.$who
    echo "VALUE $name.$who.$turn $figure $unit/s"
  done
  awk -v name="$name" 'FNR == 1 {file++} {sum[file] += $1} END {printf "RATIO %s %.3f\n", name, sum[1] / sum[2]}' \
    $STATE/$name.ours $STATE/$name.theirs
}

is_figure() { echo "$1" | grep -xE '[0-9]+\.[0-9]+'; }

# serve PORT COMMAND: for each connection
serve() {
  printf '#!/bin/sh\nexec %s\n' "$2" >"/tmp/serve.$1"
  chmod +x "/tmp/serve.$1"
  nc -ll -p "$1" -e "/tmp/serve.$1" &
}

idle() {
  local daemon
  daemon=$(cat $STATE/pid)
  switches "$daemon" >/tmp/before
  sleep 10
  switches "$daemon" | awk 'NR == FNR {before[$1] = $3; next} $3 > before[$1] {print "VALUE idle_switches." $2 " " $3 - before[$1] " per-10s"; n++} END {exit n > 0}' \
    /tmp/before -
}

# Of each thread: number, name, how often it has slept or had to wait. But for Linux's own threads for io_uring, which look every five seconds whether
# they are needed.
switches() {
  local task
  for task in "/proc/$1/task"/*; do
    grep -q ^iou-wrk "$task/comm" || echo "${task##*/} $(tr ' ' _ <"$task/comm") $(awk '/ctxt_switches/ {sum += $2} END {print sum}' "$task/status")"
  done
}
