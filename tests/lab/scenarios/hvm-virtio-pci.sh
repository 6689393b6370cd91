# an HVM guest drives virtio devices of pcibackd's over PCI, beside QEMU's own: entropy and a disk
ALONE=yes
MACHINE=hvm
TIMEOUT=500
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
END
  must "the backend starts" start_backend
  must "an HVM guest starts" create_hvm_guest hvm
  check "its drivers take the devices" guest hvm 'modprobe virtio_pci && modprobe virtio_rng && modprobe virtio_blk && wait_until [ -b /dev/vda ]'
  check "there are random bytes" guest hvm '[ $(dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c) = 256 ]'
  check "the disk has what is in its image" has "$sum" guest hvm 'sum_of /dev/vda'
  check "messages tell of it" guest hvm 'grep -E "msi-x +virtio" /proc/interrupts | awk "{n += \$2} END {exit n == 0}"'
  check "what the guest writes" guest hvm 'yes pciback | dd of=/dev/vda bs=64k count=16 oflag=direct iflag=fullblock 2>/dev/null; sync'
  check "is in the image" eval '[ "$(first_mib </tmp/disk.img)" = "$(yes pciback | first_mib)" ]'
  check "killed, it starts again" restart_killed
  check "and the disk still reads" guest hvm 'sum_of /dev/vda'
  check "the guest is destroyed" destroy hvm
  check "nothing of it is left in Xen" wait_for 10 no_zombie
}

first_mib() { dd bs=64k count=16 iflag=fullblock 2>/dev/null | sha256sum | cut -d' ' -f1; }

restart_killed() {
  kill -9 "$(cat $STATE/pid)"
  start_backend
}

no_zombie() { [ "$(xl list | wc -l)" = 2 ]; }
