# a dom0 that is PVH, from which devices cannot be given to guests: the doctor tells
ALONE=yes
MACHINE=hvm
XEN="spec-ctrl=no,eager-fpu=yes dom0=pvh"
story() {
  check "dom0 is PVH" grep PVH /sys/hypervisor/guest_type
  must "the backend starts" start_backend
  check "the doctor says that it is, and what to do" doctor_tells
}

doctor_tells() {
  pciback doctor >/tmp/doctor && { echo "no problem found"; return 1; }
  grep "^  Xen  *problem .*PVH" /tmp/doctor || { cat /tmp/doctor; return 1; }
}
