# One boot: the machine, and what is made of what it says. Sourced by ../run.
# shellcheck shell=bash disable=SC2154

# The machine that all scenarios share. A scenario adds to it with DEVICES="-device ...".
#   00:05.0  e1000e, MSI-X; its network answers pings at 10.0.2.2, as each of them does
#   00:06.0  rtl8139, INTx only
#   00:07.0  AHCI with a disk, MSI
#   00:08.0  NVMe, MSI-X
#   01:00.0  e1000e behind the root port 00:09.0
#   02:00.0  igb, which has SR-IOV, behind the root port 00:0a.0
devices() {
  case $(setting "$1" MACHINE) in
    hvm) echo "$hvm_devices" ;;
    linux) if [[ $(setting "$1" IOMMU) == amd ]]; then echo "$amd_devices"; else linux_devices; fi ;;
    *) xen_devices ;;
  esac
  for name in "$@"; do
    setting "$name" DEVICES
    [[ ! $(setting "$name" DISK) ]] || echo "-drive file=$work/disk.img,id=root,if=none,format=raw -device nvme,bus=pcie.0,addr=0x10,drive=root,serial=root"
  done
}

xen_devices() {
  echo "-device intel-iommu,intremap=on
    -netdev user,id=net5 -device e1000e,bus=pcie.0,addr=5,netdev=net5,mac=52:54:00:00:00:05,romfile=
    -netdev user,id=net6 -device rtl8139,bus=pcie.0,addr=6,netdev=net6,mac=52:54:00:00:00:06,romfile=
    -drive file=$work/sata.img,id=sata,if=none,format=raw -device ich9-ahci,id=ahci,bus=pcie.0,addr=7 -device ide-hd,bus=ahci.0,drive=sata
    -drive file=$work/nvme.img,id=nvme,if=none,format=raw -device nvme,bus=pcie.0,addr=8,drive=nvme,serial=nvme
    -device pcie-root-port,id=port9,bus=pcie.0,addr=9,chassis=9
    -netdev user,id=net10 -device e1000e,bus=port9,netdev=net10,mac=52:54:00:00:00:10,romfile=
    -device pcie-root-port,id=port10,bus=pcie.0,addr=a,chassis=10
    -netdev user,id=net20 -device igb,bus=port10,netdev=net20,mac=52:54:00:00:00:20,romfile="
}

# setting SCENARIO NAME DEFAULT: what a scenario's file says on a line NAME=... or NAME="..."
setting() {
  local value=${3:-}
  if grep -q "^$2=" "$lab/scenarios/$1.sh"; then value=$(sed -n "s/^$2=//p" "$lab/scenarios/$1.sh"); value=${value#\"} value=${value%\"}; fi
  echo "$value"
}

first_mib_sum() { head -c 1M "$1" | sha256sum | cut -d' ' -f1; }

# boot NAME...: plays these scenarios in one boot. Adds to $failed, $boots and $faults, and leaves in $not_played what a failure kept from being played.
boot() {
  local qemu=(qemu-system-x86_64 -cpu max,vendor=GenuineIntel)
  local line name="" log=$logs/$1.log cpus=2 console=$logs/$1.console.log limit=60 verdict="" status=0 now xen initrd="" arguments="" machine
  not_played=()
  ((boots += 1))
  for name in "$@"; do
    limit=$((limit + $(setting "$name" TIMEOUT 240) + 10))
  done
  rm -rf "$work/settings"
  mkdir -p "$work/settings/lab"
  cat >"$work/settings/lab/settings" <<END
PLAY="$*"
BACKEND=$backend
PCIBACKD_FLAGS="$flags"
SATA_SUM=$(first_mib_sum "$work/sata.img")
NVME_SUM=$(first_mib_sum "$work/nvme.img")
ROM_SUM=$(first_mib_sum "$work/rom.img")
END
  machine=$(setting "$1" MACHINE xen)
  if [[ $machine == linux ]]; then
    { cat "$(linux_base)"; archive "$work/linux"; archive "$work/settings"; } >"$work/linux.img"
  elif [[ $(setting "$1" DISK) ]]; then
    make_disk "$(setting "$1" PREPARE)" "$work/settings/lab/settings"
    initrd=$work/initrd.img arguments="root=LABEL=dom0 ro $(setting "$1" KERNEL)"
  else
    { cat "$dom0_base"; archive "$work/dom0"; archive "$work/settings"; } >"$work/dom0.img"
    initrd=$work/dom0.img arguments=
  fi
  [[ $(setting "$1" IOMMU) != amd ]] || qemu=("${amd_qemu[@]}")
  if [[ $machine == hvm ]]; then
    qemu=("${hvm_qemu[@]}")
    cpus=$hvm_cpus
    { cat "$(hvm_base)"; hvm_guest; } >>"$work/dom0.img"
  fi
  # Mitigations for the faults of old processors cost half of the time here and protect nothing: off, unless a scenario says otherwise. But not
  # eager-fpu: with lazy FPU switching, programs in dom0 and in guests lose their SSE registers now and then, and crash.
  xen=spec-ctrl=no,eager-fpu=yes
  [[ $# -gt 1 ]] || xen=$(setting "$1" XEN "$xen")
  # x2apic=0: with x2APIC, interrupts that Xen routes to CPU 1 arrive at CPU 0 under this emulation
  # sched=credit: with credit2, Xen's default, dom0 sooner or later stays in the run queue for ever while both CPUs are idle, mostly in `xl create`
  local system=(-kernel "$kernel/xen" -append "console=com1 com1=115200,8n1 loglvl=all guest_loglvl=all conring_size=1M dom0_mem=1024M,max:1024M dom0_max_vcpus=1 sched=credit sched_credit_tslice_ms=1 x2apic=0 $xen"
    -initrd "$kernel/vmlinux console=hvc0 loglevel=5 random.trust_cpu=on rodata=off $arguments,$initrd")
  [[ $machine != linux ]] || system=(-kernel "$kernel/vmlinux" -append "$linux_arguments" -initrd "$work/linux.img")
  # com1 is Xen's and the kernel's; what the scenarios say comes out of com2, so that nothing is mixed into it
  # shellcheck disable=SC2046,SC2086
  set -- "$@" -- timeout "$limit" "${qemu[@]}" -accel tcg,thread=multi -smp "$cpus" -m 3072 -machine q35 \
    -nographic -nodefaults -no-reboot -monitor none -serial "file:$console" -serial stdio \
    "${system[@]}" $(devices "$@") ${LAB_QEMU:-}
  local play=()
  while [[ $1 != -- ]]; do play+=("$1"); shift; done
  shift
  echo "lab: booting ${machine/xen/Xen} for ${play[*]}"
  : >"$log"
  while IFS= read -r line; do
    line=${line%$'\r'}
    case $line in
      'LAB-BEGIN '*)
        name=${line#LAB-BEGIN } now=$SECONDS
        [[ $log == "$logs/$name.log" ]] || { log=$logs/$name.log; : >"$log"; } ;;
      'LAB-PASS')
        echo "lab: $name: PASS ($((SECONDS - now)) s)"
        play=("${play[@]:1}") ;;
      'LAB-FAIL') verdict=failed ;;
      'RATIO '* | 'VALUE '*) echo "$line" ;;
    esac
    printf '%s\n' "$line" >>"$log"
  done < <("$@" </dev/null 2>&1)
  wait $! || status=$?
  ((${#play[@]})) || return 0
  local fault=""
  # See the README: once in a great while QEMU 10.0.2 does (physmem.c)
  if [[ $status == 134 ]] && grep -q 'iotlb_to_section: Assertion' "$log"; then fault="QEMU aborted by an assertion of its own"; fi
  # See hvm_cpus
  if grep -q 'HVM shutdown action' "$console"; then fault="a guest died of a triple fault"; fi
  if [[ $fault ]]; then
    ((faults += 1))
    if ((faults == 1)); then
      echo "lab: $fault: a fault of the emulation; booting again"
      boot "${play[@]}"
      return
    fi
    # a crash of ours could hide here
    echo "lab: $fault, and that is the second boot of this run that failed so: not to be believed of the emulation"
  fi
  # ended early: a scenario failed, or the machine did
  tail -n 120 "$log"
  [[ $verdict ]] || { echo "--- the machine ended before its time (status $status); its console:"; tail -n 40 "$console"; }
  echo "lab: ${play[0]}: FAIL (log: $log, the machine's console: $console)"
  failed+=("${play[0]}")
  not_played=("${play[@]:1}")
}
