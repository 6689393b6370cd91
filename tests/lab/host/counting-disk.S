# A disk whose boot sector is a guest in itself, and soon there: again and again it writes a number to a sector by INT 13h, reads it back, and writes
# down how far it is.
#
#   sector 0         this program
#   sector 8         the last number that it wrote, and how often something was wrong: 4 bytes each
#   sector 16 to 79  numbers

	.set BUFFER, 0x8000
	.set WORDS, 128			# of 4 bytes, in a sector
	.set REPORT, 8
	.set NUMBERS, 16

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
	xor %ebp, %ebp			# the number

next:
	inc %ebp
	mov %ebp, %eax
	call fill
	mov %ebp, %eax
	and $63, %eax
	add $NUMBERS, %eax
	mov $0x43, %ah
	call transfer
	xor %eax, %eax
	call fill
	mov %ebp, %eax
	and $63, %eax
	add $NUMBERS, %eax
	mov $0x42, %ah
	call transfer
	mov %ebp, %eax
	mov $BUFFER, %di
	mov $WORDS, %cx
	repe scasl
	je 1f
	incl wrong
1:	mov %ebp, BUFFER
	mov wrong, %eax
	mov %eax, BUFFER + 4
	mov $REPORT, %eax
	mov $0x43, %ah
	call transfer
	sti
	hlt				# until the next tick of the clock: others are to have the processor, too
	jmp next

fill:
	mov $BUFFER, %di
	mov $WORDS, %cx
	rep stosl
	ret

# Reads (AH 0x42) or writes (0x43) the sector AL
transfer:
	movzbl %al, %ecx
	mov %ecx, packet_sector
	mov $packet, %si
	mov drive, %dl
	mov $0, %al
	int $0x13
	jnc 1f
	incl wrong
1:	ret

wrong:	.long 0
packet:	.byte 16, 0
	.word 1, BUFFER, 0
packet_sector:
	.quad 0
drive:	.byte 0

	.org 510
	.word 0xaa55
