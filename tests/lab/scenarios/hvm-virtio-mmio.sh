# an HVM guest finds virtio-mmio by an ACPI table of ours: disks of xl's own configuration, of both versions, and entropy in a slot by name
ALONE=yes
MACHINE=hvm
TIMEOUT=600
GUEST_TIMEOUT=300
virtio="format=raw,access=rw,backendtype=standalone,specification=virtio"
# Long, for each line is a write into a pipe, and these are slow here
word=0123456789abcdef0123456789abcdef0123456789abcdef
story() {
  for image in one two; do dd if=/dev/urandom of=/tmp/$image.img bs=64k count=128 2>/dev/null; done
  mkdir -p /etc/pciback
  cat >/etc/pciback/pcibackd.toml <<'END'
[[guest.hvm.virtio]]
type = "rng"
transport = "mmio"
slot = "5"
[guest.hvm.disk.xvdf]
version = 1
END
  must "the backend starts" start_backend
  check "the table for the guest is written" eval 'pciback acpi hvm >/tmp/line'
  must "an HVM guest starts" create_hvm_guest hvm "$(cat /tmp/line)" \
    "disk=[\"$virtio,vdev=xvde,target=/tmp/one.img\", \"$virtio,vdev=xvdf,target=/tmp/two.img\"]"
  check "its drivers take the devices" guest hvm 'modprobe virtio_mmio && modprobe virtio_rng && modprobe virtio_blk && wait_until [ -b /dev/vdb ]'
  check "one disk is of version 2, the other of version 1" has "1 0" guest hvm 'echo $(cut -c 33 /sys/block/vd[ab]/device/features)'
  check "one disk has what is in its image" has "$(first_mib </tmp/one.img)" guest hvm 'sum_of /dev/vda'
  check "the other one, too" has "$(first_mib </tmp/two.img)" guest hvm 'sum_of /dev/vdb'
  check "there are random bytes" guest hvm '[ $(dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c) = 256 ]'
  check "a line of its own tells of each device" has 3 guest hvm 'awk "/virtio[0-9]/ && \$2 > 0" /proc/interrupts | wc -l'
  check "what the guest writes to both" guest hvm "word=$word;"' for disk in a b; do yes $word$disk | dd of=/dev/vd$disk bs=64k count=16 oflag=direct iflag=fullblock 2>/dev/null; done; sync'
  check "is in one image" same one ${word}a
  check "and in the other" same two ${word}b
  must "the guest begins to write" tell hvm "word=$word;"' for round in 1 2 3 4; do for disk in a b; do yes $word$disk$round | dd of=/dev/vd$disk bs=4k count=256 oflag=direct iflag=fullblock 2>/dev/null; done; done; sync'
  check "killed meanwhile, the backend starts again" restart_killed
  check "the guest has written all of it" each_change 200 "$(result)" guest_has_answered "$(result)" "$(cat $STATE/number)"
  check "and it is in one image" same one ${word}a4
  check "and in the other" same two ${word}b4
  check "a guest that is to have the same disk is refused, without a wait" no_wait refused
  check "and the log says why" grep -q "xvde cannot be had.*/tmp/one.img is in use" $LOG
  check "the first guest still has it" guest hvm 'sum_of /dev/vda'
  check "the guest is destroyed, without a wait" no_wait destroy hvm
  check "no node is left of its disks" not eval 'xenstore-ls -f / | grep virtio_disk'
  check "nothing of it is left in Xen" wait_for 10 no_zombie
}

# same IMAGE WORD: its first MiB is the word again and again
same() { [ "$(first_mib <"/tmp/$1.img")" = "$(yes "$2" | first_mib)" ]; }

result() { echo "/local/domain/$(xl domid hvm)/data/result"; }

refused() {
  printf '%s\n' 'name="second"' 'type="hvm"' 'memory=64' "disk=[\"$virtio,vdev=xvde,target=/tmp/one.img\"]" >/tmp/second.cfg
  ! xl create /tmp/second.cfg >/tmp/second.out 2>&1 && grep "unable to add device.*virtio_disk" /tmp/second.out
}
