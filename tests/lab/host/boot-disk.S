# The start of a disk from which the BIOS boots a Linux kernel that is not packed: hvm.sh puts the disk together, and says how long its parts are.
#
#   sector 0 to 4  this program, and in the last of them the kernel's command line
#   sector 7       where it writes, as text, what it has read
#   from sector 8  SETUP sectors: the kernel's real-mode part
#                  IMAGE sectors: the kernel as it is to be in memory
#                  INITRD sectors: the initial RAM disk
#
# The kernel's real-mode part makes the first steps, as the boot protocol has it (Documentation/arch/x86/boot.rst). Where the program that unpacks the
# kernel would be, it finds `enter32`.

	.set SECTOR, 512
	.set CHUNK, 127			# sectors in one read: more is not every BIOS's
	.set BUFFER, 0x10000
	.set TABLES, 0x20000
	.set REAL_MODE, 0x90000
	.set REAL_MODE_STACK, 0xe000	# its end, behind what is read, in the same 64 KiB
	.set KERNEL, 0x1000000
	.set RAMDISK, 0x8000000
	.set REPORT, 7
	.set FIRST, 8

	.code16
	.globl start
start:
	ljmp $0, $1f
1:	xor %ax, %ax
	mov %ax, %ds
	mov %ax, %es
	mov %ax, %ss
	mov $start, %sp
	cld
	mov %dl, drive
	mov $0x42, %ah
	call transfer			# the rest of this program
	jmp load_all

# Reads (AH 0x42) or writes (0x43) what the packet says
transfer:
	mov $packet, %si
	mov drive, %dl
	mov $0, %al
	int $0x13
	jc failed
	ret
failed:
	mov $complaint, %si
	mov $(complaint_end - complaint), %cx
	call say
1:	hlt
	jmp 1b

# Says CX bytes at SI through the port for messages to Xen
say:
	lodsb
	outb %al, $0xe9
	loop say
	ret

packet:	.byte 16, 0
packet_count:
	.word 4
packet_offset:
	.word start + SECTOR
packet_segment:
	.word 0
packet_sector:
	.quad 1
drive:	.byte 0
complaint:
	.ascii "boot-disk: INT 13h failed\n"
complaint_end:

	.org SECTOR - 2
	.word 0xaa55

load_all:
	movl $FIRST, packet_sector
	mov $SETUP, %ebp
	mov $REAL_MODE, %edi
	call load
	mov $IMAGE, %ebp
	mov $KERNEL, %edi
	call load
	mov $INITRD, %ebp
	mov $RAMDISK, %edi
	call load

	mov $(SETUP + IMAGE + INITRD), %eax
	mov $count_end, %di
	call decimal
	movzwl sum, %eax
	mov $sum_end, %di
	call decimal
	mov $report, %si
	mov $(report_end - report), %cx
	call say
	movw $1, packet_count
	movw $report, packet_offset
	movw $0, packet_segment
	movl $REPORT, packet_sector
	mov $0x43, %ah
	call transfer

	mov $REAL_MODE >> 4, %ax
	mov %ax, %ds
	movb $0xff, 0x210		# type_of_loader: one without a number
	orb $0x80, 0x211		# loadflags: there is a heap
	movl $enter32, 0x214		# code32_start
	movl $RAMDISK, 0x218		# ramdisk_image
	movl $(INITRD * SECTOR), 0x21c	# ramdisk_size
	movw $(REAL_MODE_STACK - 0x200), 0x224 # heap_end_ptr
	movl $command_line, 0x228	# cmd_line_ptr
	cli
	mov %ax, %es
	mov %ax, %ss
	mov %ax, %fs
	mov %ax, %gs
	mov $REAL_MODE_STACK, %sp
	ljmp $(REAL_MODE >> 4) + 0x20, $0

# Reads EBP sectors, from where the last ones ended, to EDI, which may be beyond the first MiB
load:
	mov $CHUNK, %eax
	cmp %eax, %ebp
	cmovb %ebp, %eax
	mov %ax, packet_count
	movw $0, packet_offset
	movw $BUFFER >> 4, packet_segment
	mov $0x42, %ah
	call transfer
	movzwl packet_count, %ecx
	add %ecx, packet_sector
	sub %ecx, %ebp
	shl $9, %ecx
	call add_up

	push %ecx
	mov %edi, %eax			# the block is moved by the BIOS, too
	mov %ax, move_to
	shr $16, %eax
	mov %al, move_to + 2
	mov %ah, move_to + 5
	shr $1, %cx
	mov $move, %si
	mov $0x87, %ah
	int $0x15
	jc failed
	pop %ecx
	add %ecx, %edi
	test %ebp, %ebp
	jnz load
	ret

# The BSD checksum, as of `sum`, over the CX bytes of the buffer, and those before
add_up:
	push %cx
	mov $BUFFER >> 4, %ax
	mov sum, %bx
	mov %ax, %ds
	xor %si, %si
	xor %ax, %ax
1:	lodsb
	ror %bx
	add %ax, %bx
	dec %cx
	jnz 1b
	mov %cx, %ds
	mov %bx, sum
	pop %cx
	ret

# Writes EAX as a decimal number that ends before DI
decimal:
	xor %edx, %edx
	mov $10, %ecx
	div %ecx
	add $'0', %dl
	dec %di
	mov %dl, (%di)
	test %eax, %eax
	jnz decimal
	ret

sum:	.word 0
report:	.ascii "boot-disk: INT 13h read 000000"
count_end:
	.ascii " sectors, sum 00000"
sum_end:
	.ascii "\n"
report_end:
	.fill SECTOR - (report_end - report)

	.balign 8
move:	.quad 0, 0			# what INT 15h, AH 87h wants: descriptors, of which the middle ones say from where and to where
	.word 0xffff, BUFFER & 0xffff
	.byte BUFFER >> 16, 0x93, 0, 0
	.word 0xffff
move_to:
	.word 0
	.byte 0, 0x93, 0, 0
	.quad 0, 0

# The real-mode part comes here in protected mode, with its parameters at ESI, which the kernel gets. It begins in 64-bit mode, and wants memory to be
# mapped where it is: the first 4 GiB, in pages of 2 MiB.
	.code32
enter32:
	mov $TABLES, %edi
	mov %edi, %cr3
	xor %eax, %eax
	mov $(6 * 1024), %ecx
	rep stosl
	movl $(TABLES + 0x1003), TABLES
	mov $(TABLES + 0x1000), %edi
	lea 0x1003(%edi), %eax
	mov $4, %ecx
1:	mov %eax, (%edi)
	add $0x1000, %eax
	add $8, %edi
	loop 1b
	mov $(TABLES + 0x2000), %edi
	mov $0x83, %eax
	mov $2048, %ecx
1:	mov %eax, (%edi)
	add $0x200000, %eax
	add $8, %edi
	loop 1b

	mov %cr4, %eax
	or $0x20, %eax			# PAE
	mov %eax, %cr4
	mov $0xc0000080, %ecx		# EFER
	rdmsr
	or $0x100, %eax			# LME
	wrmsr
	lgdt segments_at
	mov %cr0, %eax
	or $0x80000000, %eax		# PG
	mov %eax, %cr0
	ljmp $0x10, $enter64
	.code64
enter64:
	mov $KERNEL, %eax
	jmp *%rax

	.balign 8
segments:
	.quad 0, 0, 0x00af9a000000ffff, 0x00cf92000000ffff
segments_at:
	.word segments_at - segments - 1
	.long segments

	.org 4 * SECTOR
command_line:			# is put here
