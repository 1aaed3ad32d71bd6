CREATE TABLE applications (
    id         text COLLATE "C" CONSTRAINT applications_pkey PRIMARY KEY,
    name       varchar(256) NOT NULL,
    comments   varchar(1024),
    version    integer NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT applications_name_key UNIQUE (name),
    CONSTRAINT applications_id_check CHECK (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    CONSTRAINT applications_name_check CHECK (name ~ '\S')
);

CREATE TABLE configurations (
    id             text COLLATE "C" CONSTRAINT configurations_pkey PRIMARY KEY,
    application_id text COLLATE "C" NOT NULL,
    name           varchar(256) NOT NULL,
    comments       varchar(1024),
    config         jsonb NOT NULL,
    version        integer NOT NULL DEFAULT 1,
    created_at     timestamptz NOT NULL DEFAULT now(),
    updated_at     timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT configurations_application_id_fkey
        FOREIGN KEY (application_id) REFERENCES applications (id) ON DELETE CASCADE,
    CONSTRAINT configurations_application_id_name_key UNIQUE (application_id, name),
    CONSTRAINT configurations_id_check CHECK (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    CONSTRAINT configurations_name_check CHECK (name ~ '\S'),
    CONSTRAINT configurations_config_check CHECK (jsonb_typeof(config) = 'object')
);

-- What a writer says of version and times does not count: they follow from what happens to the row.
CREATE FUNCTION start_versions() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.version := 1;
    NEW.created_at := clock_timestamp();
    NEW.updated_at := NEW.created_at;
    RETURN NEW;
END
$$;

CREATE FUNCTION keep_application_version() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.id <> OLD.id THEN
        RAISE 'the id of an application cannot be changed' USING ERRCODE = 'restrict_violation';
    END IF;
    NEW.created_at := OLD.created_at;
    -- A trigger within a trigger: a configuration was added or removed.
    IF pg_trigger_depth() > 1 OR (NEW.name, NEW.comments) IS DISTINCT FROM (OLD.name, OLD.comments) THEN
        NEW.version := OLD.version + 1;
        NEW.updated_at := clock_timestamp();
    ELSE
        NEW.version := OLD.version;
        NEW.updated_at := OLD.updated_at;
    END IF;
    RETURN NEW;
END
$$;

CREATE FUNCTION keep_configuration_version() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.id, NEW.application_id) IS DISTINCT FROM (OLD.id, OLD.application_id) THEN
        RAISE 'the ids of a configuration cannot be changed' USING ERRCODE = 'restrict_violation';
    END IF;
    NEW.created_at := OLD.created_at;
    -- As text, because jsonb takes 1 and 1.0 for equal and GET shows them as they are.
    IF (NEW.name, NEW.comments, NEW.config::text) IS DISTINCT FROM (OLD.name, OLD.comments, OLD.config::text) THEN
        NEW.version := OLD.version + 1;
        NEW.updated_at := clock_timestamp();
    ELSE
        NEW.version := OLD.version;
        NEW.updated_at := OLD.updated_at;
    END IF;
    RETURN NEW;
END
$$;

-- Before the change, so that every writer locks the application first and none waits for another in a circle.
CREATE FUNCTION renew_application() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        UPDATE applications SET version = version + 1 WHERE id = NEW.application_id;
        RETURN NEW;
    END IF;
    UPDATE applications SET version = version + 1 WHERE id = OLD.application_id;
    RETURN OLD;
END
$$;

CREATE TRIGGER applications_insert BEFORE INSERT ON applications
    FOR EACH ROW EXECUTE FUNCTION start_versions();
CREATE TRIGGER applications_update BEFORE UPDATE ON applications
    FOR EACH ROW EXECUTE FUNCTION keep_application_version();
CREATE TRIGGER configurations_insert BEFORE INSERT ON configurations
    FOR EACH ROW EXECUTE FUNCTION start_versions();
CREATE TRIGGER configurations_update BEFORE UPDATE ON configurations
    FOR EACH ROW EXECUTE FUNCTION keep_configuration_version();
CREATE TRIGGER configurations_renew_application BEFORE INSERT OR DELETE ON configurations
    FOR EACH ROW EXECUTE FUNCTION renew_application();

-- Volatile, so that it sees what was committed while its statement waited for the application's row:
-- once that row is locked, no configuration comes or goes.
CREATE FUNCTION configuration_ids_now(application text) RETURNS text[] LANGUAGE sql VOLATILE AS $$
    SELECT ARRAY(SELECT id FROM configurations WHERE application_id = application ORDER BY id)
$$;
