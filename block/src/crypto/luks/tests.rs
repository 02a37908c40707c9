use super::*;
use crate::crypto::cipher::{CipherAlgorithm, CipherMode};
use crate::io::thread_time;

const QUICK: Duration = Duration::from_millis(1);

fn quick() -> LuksOptions {
    LuksOptions {
        iter_time: QUICK,
        ..LuksOptions::default()
    }
}

fn fresh() -> (LuksHeader, MasterKey, Vec<u8>) {
    LuksHeader::create(&quick(), b"secret", thread_time).expect("created")
}

#[test]
fn a_header_comes_back_as_it_was() {
    let (header, _, _) = fresh();
    let bytes = header.to_bytes();
    assert_eq!(bytes.len(), HEADER_LEN);
    let parsed = LuksHeader::parse(&bytes).expect("parses");
    assert_eq!(parsed.to_bytes(), bytes);
    assert_eq!(parsed.slots, header.slots);
    assert_eq!(parsed.spec, header.spec);
    // As QEMU lays it out for two keys of 256 bits.
    assert_eq!(parsed.payload_offset, 2_068_480);
    assert_eq!(parsed.slots[1].key_offset, 4096 + 258_048);
    assert_eq!(parsed.uuid.len(), 36);
}

#[test]
fn only_the_right_password_unlocks() {
    let (header, key, material) = fresh();
    let open = |slot: usize, password: &[u8]| {
        header
            .unlock(slot, password, &mut material.clone())
            .expect("tried")
    };
    assert_eq!(open(0, b"secret"), Some(key));
    assert_eq!(open(0, b"wrong"), None);
    assert_eq!(open(0, b""), None);
    assert_eq!(open(1, b"secret"), None, "an empty slot");
}

#[test]
fn every_slot_takes_a_key_and_gives_it_up() {
    let (mut header, key, first) = fresh();
    for slot in 1..KEY_SLOTS {
        let password = [slot as u8; 5];
        let material = header
            .add_key(slot, &key, &password, QUICK, thread_time)
            .expect("added");
        let found = header.unlock(slot, &password, &mut material.clone());
        assert_eq!(found.expect("tried").as_ref(), Some(&key), "{slot}");
    }
    assert_eq!(header.active_slots(), KEY_SLOTS);
    let again = header.add_key(3, &key, b"x", QUICK, thread_time);
    assert!(
        again
            .expect_err("in use")
            .to_string()
            .contains("already active")
    );
    let beyond = header.add_key(8, &key, b"x", QUICK, thread_time);
    assert!(
        beyond
            .expect_err("none")
            .to_string()
            .contains("between 0 and 7")
    );
    header.erase_key(0).expect("erased");
    let gone = header.unlock(0, b"secret", &mut first.clone());
    assert_eq!(gone.expect("tried"), None);
    LuksHeader::parse(&header.to_bytes()).expect("still a header");
}

#[test]
fn other_ciphers_make_headers_too() {
    for (algorithm, mode, iv, hash) in [
        (
            CipherAlgorithm::Aes192,
            CipherMode::Cbc,
            IvGenerator::Essiv,
            HashAlgorithm::Sha1,
        ),
        (
            CipherAlgorithm::Cast5,
            CipherMode::Cbc,
            IvGenerator::Plain,
            HashAlgorithm::Ripemd160,
        ),
        (
            CipherAlgorithm::Twofish256,
            CipherMode::Xts,
            IvGenerator::Plain64,
            HashAlgorithm::Sha512,
        ),
    ] {
        let spec = CipherSpec {
            algorithm,
            mode,
            iv,
            iv_hash: None,
        };
        let options = LuksOptions {
            spec,
            hash,
            iter_time: QUICK,
        };
        let (header, key, mut material) =
            LuksHeader::create(&options, b"p", thread_time).expect("created");
        let parsed = LuksHeader::parse(&header.to_bytes()).expect("parses");
        assert_eq!(parsed.spec, options.check().expect("valid").spec);
        let found = parsed.unlock(0, b"p", &mut material).expect("tried");
        assert_eq!(found, Some(key), "{spec:?}");
    }
}

/// Each damaged field is refused with a message that names it.
#[test]
fn damaged_fields_are_named() {
    let good = fresh().0.to_bytes();
    let slot = |index: usize, field: usize| SLOTS + index * SLOT_LEN + field;
    let cases: &[(usize, &[u8], &str)] = &[
        (0, b"LUKX", "not in LUKS format"),
        (VERSION, &[0, 2], "LUKS version 2 is not supported"),
        (CIPHER_NAME, &[b'a'; 32], "cipher-name"),
        (CIPHER_NAME, b"rot13\0", "Algorithm 'rot13'"),
        (
            CIPHER_MODE,
            b"xts\0",
            "Unexpected cipher mode string format 'xts'",
        ),
        (CIPHER_MODE, b"zzz-plain\0", "Cipher mode 'zzz'"),
        (CIPHER_MODE, b"cbc-lmk\0", "IV generator 'lmk'"),
        (CIPHER_MODE, b"xts-essiv\0", "Missing IV generator hash"),
        (
            CIPHER_MODE,
            b"xts-essiv:sha1\0",
            "No aes cipher with key size 20",
        ),
        (CIPHER_MODE, b"xts-plain64:abc\0", "Hash algorithm 'abc'"),
        (HASH_SPEC, b"crc32\0", "Hash algorithm 'crc32'"),
        (HASH_SPEC, &[0xff, 0xfe, 0], "hash-spec"),
        (KEY_BYTES, &[0xff; 4], "key-bytes"),
        (KEY_BYTES, &[0, 0, 0, 63], "key-bytes"),
        (KEY_BYTES, &[0; 4], "key-bytes"),
        (PAYLOAD_OFFSET, &[0; 4], "payload-offset"),
        (
            PAYLOAD_OFFSET,
            &[0, 0, 1, 0],
            "Keyslot 0 is overlapping with the encrypted payload",
        ),
        (MK_ITERATIONS, &[0; 4], "mk-digest-iter"),
        (MK_ITERATIONS, &[0xff; 4], "mk-digest-iter 4294967295"),
        (slot(2, 0), &[0; 4], "key-slot-2 active"),
        (slot(0, 4), &[0; 4], "key-slot-0 iterations"),
        (slot(0, 4), &[0xff; 4], "key-slot-0 iterations"),
        (
            slot(5, 40),
            &[0, 0, 0, 1],
            "Keyslot 5 is overlapping with the LUKS header",
        ),
        (
            slot(5, 40),
            &[0xff; 4],
            "Keyslot 5 is overlapping with the encrypted payload",
        ),
        (
            slot(5, 40),
            &[0, 0, 0, 9],
            "Keyslots 0 and 5 are overlapping",
        ),
        (slot(7, 44), &[0xff; 4], "key-slot-7 stripes"),
        (slot(7, 44), &[0; 4], "key-slot-7 stripes"),
    ];
    for (at, bytes, expected) in cases {
        let mut damaged = good.clone();
        damaged[*at..*at + bytes.len()].copy_from_slice(bytes);
        let error = LuksHeader::parse(&damaged).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error:?}, expected {expected:?}");
    }
    assert!(LuksHeader::parse(&good[..HEADER_LEN - 1]).is_err());
    assert!(LuksHeader::parse(&[]).is_err());
}

#[test]
fn an_absurd_iteration_time_is_refused_before_it_is_spent() {
    let options = LuksOptions {
        iter_time: Duration::from_secs(1 << 40),
        ..quick()
    };
    let error = LuksHeader::create(&options, b"p", thread_time).expect_err("too long");
    assert!(error.to_string().contains("iter-time"), "{error}");
    let options = LuksOptions {
        iter_time: Duration::ZERO,
        ..quick()
    };
    assert!(LuksHeader::create(&options, b"p", thread_time).is_err());
}
