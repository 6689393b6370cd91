# an HVM guest finds virtio-mmio devices by an ACPI table of ours: disks from xl's own configuration, of both versions, and another type in a slot
ALONE=yes
MACHINE=hvm
TIMEOUT=500
GUEST_TIMEOUT=300
story() {
  dd if=/dev/urandom of=/tmp/one.img bs=64k count=128 2>/dev/null
  mkdir -p /etc/pciback
  cat >/etc/pciback/pcibackd.toml <<'END'
[[guest.hvm.virtio]]
type = "blk"
path = "/tmp/one.img"
transport = "mmio"
version = 1
[[guest.hvm.virtio]]
type = "rng"
transport = "mmio"
slot = "5"
END
  must "the backend starts" start_backend
  check "there is a table for the guest" eval 'pciback acpi hvm >/tmp/line'
  must "an HVM guest starts" create_guest hvm 'type="hvm"; kernel="/lab/vmlinuz"; ramdisk="/lab/guest.img.gz"; memory=300' 'vga="none"; nographic=1' "$(cat /tmp/line)"
  check "its drivers take the devices" guest hvm 'modprobe virtio_mmio && modprobe virtio_rng && modprobe virtio_blk && wait_until [ -b /dev/vda ]'
  check "seen" guest hvm 'dmesg | grep -i -E "virtio|LNRO" | tail; cat /proc/interrupts | grep -i virtio; ls /sys/bus/platform/drivers/virtio-mmio; false'
  check "the disk has what is in its image" has "$(first_mib </tmp/one.img)" guest hvm 'sum_of /dev/vda'
  check "there are random bytes" guest hvm '[ $(dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c) = 256 ]'
  check "seen" guest hvm 'cat /proc/interrupts; false'
}

first_mib() { dd bs=64k count=16 iflag=fullblock 2>/dev/null | sha256sum | cut -d' ' -f1; }
