# an HVM guest drives a disk of pcibackd's in every wrong way; its other disk, and another guest, carry on
ALONE=yes
MACHINE=hvm
TIMEOUT=500
GUEST_TIMEOUT=350
story() {
  for disk in bad good; do dd if=/dev/urandom of=/tmp/$disk.img bs=64k count=128 2>/dev/null; done
  mkdir -p /etc/pciback
  cat >/etc/pciback/pcibackd.toml <<'END'
[[guest.hvm.virtio]]
type = "blk"
path = "/tmp/good.img"
slot = "1f"
[[guest.hvm.virtio]]
type = "blk"
path = "/tmp/bad.img"
slot = "1e"
layout = "compact"
[[guest.other.virtio]]
type = "blk"
path = "/lab/counting.disk"
END
  must "the backend starts" start_backend
  must "an HVM guest starts" create_hvm_guest hvm
  check "one disk is its kernel's, and is written and read from now on" guest hvm '
    echo none >/sys/bus/pci/devices/0000:00:1e.0/driver_override
    modprobe virtio_pci && modprobe virtio_blk && start_hammer /dev/vda 1'
  must "another guest starts, which counts on its disk" create_counting_guest
  check "the first gives memory back to Xen" xl mem-set hvm 280m
  before=$(counted)
  begin=$(hundredths)
  must "a driver of its own breaks the rules of the other disk, which serves it whenever it does not" \
    has 'honest requests after all that' guest hvm 'lab-guest break-rules 0000:00:1e.0 3'
  took=$((($(hundredths) - begin) / 100))
  check "the other guest has counted on" [ "$(counted)" -gt $((before + took / 4)) ]
  check "the backend has not ended" backend_runs
  check "it has said what was wrong" grep 'blk in slot 1e' $LOG
  check "but not too often" eval '[ "$(grep -c "blk in slot 1e" $LOG)" -le $((took / 10 + 2)) ]'
  check "and nothing of other disks" not grep 'slot 1f' $LOG
  check "the guest's other disk was right all the time" guest hvm end_hammer
  check "the kernel's driver can have the bad disk now" guest hvm '
    echo >/sys/bus/pci/devices/0000:00:1e.0/driver_override && echo 0000:00:1e.0 >/sys/bus/pci/drivers_probe && sum_of /dev/vdb'
  before=$(counted)
  check "the other guest still counts" wait_for 20 eval '[ "$(counted)" -gt $((before + 2)) ]'
  check "and has found nothing wrong" [ "$(od -An -tu4 -j4100 -N4 /lab/counting.disk | tr -d ' ')" = 0 ]
  check "both guests are destroyed" eval 'destroy hvm && destroy other'
  check "nothing of them is left in Xen" wait_for 10 no_zombie
}

# ../host/counting-disk.S is all that runs in it
create_counting_guest() {
  echo 'name="other"; type="hvm"; memory=64; vga="none"; nographic=1' | tr ';' '\n' >/tmp/other.cfg
  xl create /tmp/other.cfg && wait_for 100 eval '[ "$(counted)" -gt 2 ]'
}

counted() { echo $(($(od -An -tu4 -j4096 -N4 /lab/counting.disk))); }
