//! Every cipher, beside QEMU.

use super::*;

#[test]
fn every_cipher_that_qemu_has_gives_the_same_bytes() {
    let mut tried = 0;
    for algorithm in CipherAlgorithm::ALL {
        for (mode, iv, iv_hash, hash) in [
            (
                CipherMode::Xts,
                IvGenerator::Plain64,
                None,
                HashAlgorithm::Sha1,
            ),
            (
                CipherMode::Cbc,
                IvGenerator::Plain,
                None,
                HashAlgorithm::Sha512,
            ),
            (
                CipherMode::Cbc,
                IvGenerator::Plain64,
                None,
                HashAlgorithm::Ripemd160,
            ),
            (
                CipherMode::Cbc,
                IvGenerator::Essiv,
                Some(HashAlgorithm::Sha256),
                HashAlgorithm::Sha256,
            ),
            (
                CipherMode::Ecb,
                IvGenerator::Plain64,
                None,
                HashAlgorithm::Sha224,
            ),
            (
                CipherMode::Xts,
                IvGenerator::Essiv,
                Some(HashAlgorithm::Md5),
                HashAlgorithm::Sha384,
            ),
        ] {
            let spec = CipherSpec {
                algorithm,
                mode,
                iv,
                iv_hash,
            };
            if spec.check().is_err() {
                continue;
            }
            // Made here: QEMU takes a second for each new volume.
            let dir = temp_dir();
            let path = dir.path().join("image");
            let luks = LuksOptions {
                spec,
                hash,
                ..quick()
            };
            create_luks(&path, luks, 256 << 10);
            let (object, name) = (object(), Kind::Luks.spec(&path));
            let args = ["--object", &object, "--image-opts", "-c", "length", &name];
            let opened = try_tool("qemu-io", &args);
            if !String::from_utf8_lossy(&opened.stdout).contains("256 KiB") {
                // This QEMU was built without it.
                continue;
            }
            tried += 1;
            let what = format!("{spec:?} {hash}");
            let write = [
                "write -P 119 0 256k".to_owned(),
                "write -P 7 1k 512".to_owned(),
            ];
            qemu_io(&name, &write);
            let disk = open(&path);
            let seen = read_all(&disk);
            assert!(seen[..1024].iter().all(|byte| *byte == 119), "{what}");
            assert!(seen[1024..1536].iter().all(|byte| *byte == 7), "{what}");
            assert!(seen[1536..].iter().all(|byte| *byte == 119), "{what}");
            let data: Vec<u8> = (0..256 << 10).map(|at: u32| (at / 300) as u8).collect();
            disk.write_at(&data, 0).unwrap();
            disk.close().unwrap();
            assert_same(&qemu_reads(&dir, &name), &data, &what);
        }
    }
    assert!(tried >= 40, "QEMU opened only {tried} of the images");
}
