//! Keys: needed, of each image of a chain, changed.

use super::*;

#[test]
fn a_key_is_needed_and_has_to_be_the_right_one() {
    for kind in Kind::ALL {
        let dir = temp_dir();
        let path = dir.path().join("image");
        kind.create(&path, 65536);
        let before = fs::read(&path).unwrap();
        let error = OpenOptions::new().open_disk(&path).err().unwrap();
        let option = format!("'{}key-secret' is required", kind.prefix());
        assert!(error.to_string().contains(&option), "{kind:?}: {error}");
        assert_eq!(error.kind(), ErrorKind::Denied, "{kind:?}");
        if kind != Kind::Qcow2Aes {
            let wrong = OpenOptions::new().key(Secret::new(b"guess".to_vec()));
            let error = wrong.open_disk(&path).err().unwrap();
            assert!(error.to_string().contains("Invalid password"), "{error}");
        }
        // Its header can be seen all the same, its data not.
        let locked = OpenOptions::new().locked(true).open_disk(&path).unwrap();
        assert_eq!(locked.size(), SIZE);
        assert!(locked.info().encrypted);
        assert_eq!(locked.format(), kind.format());
        if kind == Kind::Luks {
            assert!(locked.read_at(&mut [0; 512], 0).is_err());
        }
        let refused = locked.write_at(&[1; 512], 0).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Denied, "{refused}");
        drop(locked);
        assert!(fs::read(&path).unwrap()[..1 << 16] == before[..1 << 16]);
        let debug = format!("{:?}", OpenOptions::new().key(secret()));
        assert!(
            !debug.contains(PASSWORD) && !debug.contains("111, 112"),
            "{debug}"
        );
    }
}

#[test]
fn an_overlay_and_its_base_have_keys_of_their_own() {
    for (top, base) in [
        (Kind::Qcow2Luks, Kind::Qcow2Aes),
        (Kind::Qcow2Aes, Kind::Qcow2Luks),
        (Kind::Qcow2Luks, Kind::Luks),
    ] {
        let dir = temp_dir();
        let (below, above) = (dir.path().join("base"), dir.path().join("top"));
        base.create(&below, 65536);
        let mut model: Vec<u8> = (0..SIZE).map(|at| (at / 1000) as u8).collect();
        let disk = open(&below);
        disk.write_at(&model, 0).unwrap();
        disk.close().unwrap();
        let other = Secret::new(b"another".to_vec());
        let encrypt = match top {
            Kind::Qcow2Aes => Encrypt::Aes,
            _ => Encrypt::Luks {
                options: quick(),
                secret: other.clone(),
            },
        };
        create_qcow2(
            &above,
            &CreateOptions {
                size: SIZE,
                encrypt: Some(encrypt),
                backing_file: Some(b"base".to_vec()),
                backing_format: Some(base.format().name().into()),
                ..CreateOptions::default()
            },
        );
        let options = OpenOptions::new().key(other);
        let error = options.clone().open_disk(&above).err().unwrap();
        assert!(error.to_string().contains("is required"), "{error}");
        let disk = options.backing_key(1, secret()).open_disk(&above).unwrap();
        let bytes: Vec<u8> = (0..5000u32).map(|at| (at * 7) as u8).collect();
        for offset in [300, 65536, 200_001, SIZE - 5000] {
            disk.write_at(&bytes, offset).unwrap();
            model[offset as usize..offset as usize + 5000].copy_from_slice(&bytes);
        }
        assert_same(&read_all(&disk), &model, &format!("{top:?} over {base:?}"));
        disk.close().unwrap();
        let base_options = format!(
            "backing.driver={},backing.file.filename={},backing.{}key-secret=s",
            base.format(),
            below.to_str().unwrap(),
            base.prefix()
        );
        let spec = format!(
            "driver=qcow2,file.filename={},encrypt.key-secret=t,{base_options}",
            above.to_str().unwrap()
        );
        let plain = dir.path().join("plain");
        let object = object();
        tool(
            "qemu-img",
            &[
                "convert",
                "--object",
                &object,
                "--object",
                "secret,id=t,data=another",
                "--image-opts",
                &spec,
                "-O",
                "raw",
                plain.to_str().unwrap(),
            ],
        );
        assert_same(
            &fs::read(plain).unwrap(),
            &model,
            &format!("{top:?}: QEMU reads"),
        );
    }
}

#[test]
fn passwords_come_and_go() {
    for kind in [Kind::Luks, Kind::Qcow2Luks] {
        let dir = temp_dir();
        let path = dir.path().join("image");
        kind.create(&path, 65536);
        let disk = open(&path);
        disk.write_at(&[8; 4096], 0).unwrap();
        let add = |password: &str, slot| KeyChange::Add {
            new: Secret::new(password.into()),
            slot,
            iter_time: Duration::from_millis(1),
            force: false,
        };
        let erase = |old: Option<&str>, slot, force| KeyChange::Erase {
            old: old.map(|old| Secret::new(old.into())),
            slot,
            force,
        };
        let refused = |change: &KeyChange, expected: &str| {
            let error = disk.change_keys(change).unwrap_err().to_string();
            assert!(error.contains(expected), "{kind:?}: {error}");
        };
        disk.change_keys(&add("second", None)).unwrap();
        disk.change_keys(&add("third", Some(5))).unwrap();
        refused(&add("x", Some(5)), "Refusing to overwrite active keyslot 5");
        refused(&add("x", Some(8)), "Invalid keyslot 8");
        refused(&erase(None, None, false), "must be given");
        refused(&erase(Some("none"), None, true), "No keyslots match");
        refused(&erase(None, Some(4), false), "already erased");
        disk.change_keys(&erase(Some(PASSWORD), None, false))
            .unwrap();
        disk.change_keys(&erase(None, Some(1), false)).unwrap();
        refused(&erase(None, Some(5), false), "the only active keyslot");
        refused(
            &erase(Some("third"), None, false),
            "All the active keyslots",
        );
        disk.close().unwrap();
        let opens = |password: &str| {
            OpenOptions::new()
                .key(Secret::new(password.into()))
                .open_disk(&path)
        };
        assert!(opens(PASSWORD).is_err() && opens("second").is_err());
        let mut seen = [0; 4096];
        opens("third").unwrap().read_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [8; 4096]);
        let spec = kind.spec(&path);
        let third = "secret,id=s,data=third";
        tool(
            "qemu-io",
            &[
                "--object",
                third,
                "--image-opts",
                "-c",
                "read -P 8 0 4k",
                &spec,
            ],
        );
        let disk = opens("third").unwrap();
        disk.change_keys(&erase(None, Some(5), true)).unwrap();
        drop(disk);
        assert!(opens("third").is_err(), "no password is left");
    }
}
