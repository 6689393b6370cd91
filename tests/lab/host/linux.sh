# The machine without Xen, of scenarios that say MACHINE=linux: Linux behind VT-d, for VFIO, or behind AMD's IOMMU. Sourced by ../run.
# shellcheck shell=bash disable=SC2154,SC2034

#   00:05.0           edu, QEMU's device for learners: INTx and MSI, and DMA on demand; it has an expansion ROM
#   00:08.0           NVMe, MSI-X
#   01:00.0           igb, which has SR-IOV, behind the root port 00:0a.0
#   02:00.0           a bridge from PCI Express to PCI, behind the root port 00:0b.0; behind it, and so in its IOMMU group:
#   03:01.0, 03:02.0  edu and e1000
#   04:00.0, 05:00.0  edu, behind the root ports 00:0c.0 and 00:0d.0: they can be pulled out
linux_devices() {
  echo "-device intel-iommu,intremap=on
    -device edu,bus=pcie.0,addr=5,romfile=$work/rom.img
    -drive file=$work/nvme.img,id=nvme,if=none,format=raw -device nvme,bus=pcie.0,addr=8,drive=nvme,serial=nvme
    -device pcie-root-port,id=port10,bus=pcie.0,addr=a,chassis=10
    -netdev user,id=net20 -device igb,bus=port10,netdev=net20,mac=52:54:00:00:00:20,romfile=
    -device pcie-root-port,id=port11,bus=pcie.0,addr=b,chassis=11
    -device pcie-pci-bridge,id=pci,bus=port11
    -device edu,bus=pci,addr=1
    -netdev user,id=net32 -device e1000,bus=pci,addr=2,netdev=net32,mac=52:54:00:00:00:32,romfile=
    -device pcie-root-port,id=port12,bus=pcie.0,addr=c,chassis=12 -device edu,bus=port12
    -device pcie-root-port,id=port13,bus=pcie.0,addr=d,chassis=13 -device edu,bus=port13"
}

# With IOMMU=amd: QEMU 7.2 and an AMD machine, as for HVM guests. Behind the AMD IOMMU of QEMU 10.0.2, Linux waits in vain for interrupts, remapped or
# not. Neither tells Linux of DMA that it stops: it writes to its event log, and the register that says how far stays as it was.
#   00:05.0, 00:06.0  edu
amd_devices="-device amd-iommu -device edu,bus=pcie.0,addr=5 -device edu,bus=pcie.0,addr=6"
amd_qemu=("${older_qemu[@]}" -cpu max,vendor=AuthenticAMD)

linux_modules="vfio-pci vfio_iommu_type1 igb igbvf nvme e1000 aer_inject"
linux_programs="usr/bin/lspci usr/bin/setpci usr/bin/setpriv usr/bin/strace usr/bin/ip usr/lib/x86_64-linux-gnu/libgcc_s.so.1"

# Made once, as the other bases are. Prints its name
linux_base() {
  local recipe base d=$work/base/linux
  recipe=$(cat "$lab/host/linux.sh" "$lab/host/images.sh" <(ls -l --time-style=full-iso "$kernel/vmlinux") | sha256sum | cut -c 1-12)
  base=$cache/images/linux-$recipe.cpio
  if [[ ! -e $base ]]; then
    base_folder "$d" "$linux_modules" "$linux_programs"
    archive "$d" >"$base.part"
    mv "$base.part" "$base"
    rm -rf "$d"
  fi
  echo "$base"
}

# On a busy host, a timer that is set for a single event is lost now and then, and its CPU sleeps until something else wakes it: periodic ones. And Linux
# panics when it does not see the timer's first interrupts in time: it is not to look.
linux_arguments="highres=off nohz=off no_timer_check panic=1 console=ttyS0 loglevel=5 random.trust_cpu=on rodata=off mitigations=off intel_iommu=on"
