# hvmloader and SeaBIOS boot an HVM guest from a disk of pcibackd's: reads and a write by INT 13h
ALONE=yes
MACHINE=hvm
TIMEOUT=500
GUEST_TIMEOUT=300
story() {
  cp /lab/hvm.disk /tmp/disk.img
  mkdir -p /etc/pciback
  cat >/etc/pciback/pcibackd.toml <<'END'
[[guest.hvm.virtio]]
type = "blk"
path = "/tmp/disk.img"
END
  must "the backend starts" start_backend
  must "an HVM guest that has no other disk starts" create_hvm_guest hvm 'device_model_args_hvm=[]'
  check "the program in its first sector has read all others rightly, and written that it has" has "$(cat /lab/hvm.disk.read)" sector 7
  check "to one sector, and to no other" eval '[ "$(all_but 7 </tmp/disk.img)" = "$(all_but 7 </lab/hvm.disk)" ]'
  check "the kernel's driver goes on where the firmware's ended" has "$(first_mib </tmp/disk.img)" \
    guest hvm 'modprobe virtio_pci && modprobe virtio_blk && sum_of /dev/vda'
  check "the guest is destroyed" destroy hvm
}

sector() { dd if=/tmp/disk.img bs=512 skip="$1" count=1 2>/dev/null | tr -d '\0'; }
all_but() { { dd bs=512 count="$1" 2>/dev/null; dd bs=512 count=1 of=/dev/null 2>/dev/null; cat; } | sha256sum; }
